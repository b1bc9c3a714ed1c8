/** Writes what is known into the page; knows nothing of the server and decides nothing. */

import { duration, remaining, share, whole } from "./words.js";

/** @param {string} id @returns {any} */
export const part = (id) => document.getElementById(id);

/** @typedef {{masks: {score: number | null, area: number}[], engine: string, model_id: string, time_ms: number, trip_ms: number}} Result */

/** What happened, seen and heard. @param {string} text */
export function say(text) {
  part("status").textContent = text;
}

let spoken = 0;

/** For those who cannot see the crosshair, once it rests. @param {string} text */
export function speak(text) {
  clearTimeout(spoken);
  spoken = setTimeout(() => (part("spoken").textContent = text), 400);
}

/** @param {import("./words.js").Problem} problem @param {(() => void) | undefined} again */
export function showProblem({ text, retry, ask }, again) {
  part("problem").querySelector("p").textContent = text;
  const button = part("retry");
  button.hidden = !retry || !again;
  button.textContent = retry ?? "";
  button.onclick = () => (hideProblem(), again());
  part("ticket").hidden = ask !== "ticket";
  part("problem").hidden = false;
  if (ask === "ticket") part("ticket-text").focus();
}

export function hideProblem() {
  part("problem").hidden = true;
}

/** The photo before the server knows it, or nothing. @param {string | null} address @param {string} name */
export function showPhoto(address, name = "") {
  const photo = part("photo");
  if (address) photo.src = address;
  else photo.removeAttribute("src");
  part("shown").hidden = part("facts").hidden = part("other").hidden = !address;
  part("choose").hidden = Boolean(address);
  part("file-name").textContent = name;
  part("session").textContent = "–";
  part("left").textContent = "";
}

/** @param {number} width @param {number} height */
export function showRatio(width, height) {
  part("stage").style.setProperty("--ratio", String(width / height));
}

/** @param {number | null} sent share from 0 to 1, null when there is nothing to send */
export function showSending(sent) {
  part("sending").hidden = sent === null;
  const bar = part("sent");
  if (sent === 1) bar.removeAttribute("value");
  else bar.value = Math.round((sent ?? 0) * 100);
  const text = sent === 1 ? "The server looks at the photo …" : `Sending the photo, ${Math.round((sent ?? 0) * 100)} %`;
  part("sending").querySelector("label").textContent = text;
}

/** @param {import("./api.js").Opened} opened @param {string} name */
export function showSession({ session_id, width, height, engine, model_id }, name) {
  part("session").textContent = session_id;
  part("file-name").textContent = `${name}, ${whole(width)} × ${whole(height)}`;
  part("engine").textContent = engine;
  part("model").textContent = model_id.replace(/[+/_-]/g, "$&\u200b"); // where a long name may go on in the next line
}

/** @param {number} seconds */
export function showRemaining(seconds) {
  const text = remaining(seconds);
  if (part("left").textContent !== text) part("left").textContent = text;
}

/** @param {Result | null} result @param {number} index @param {{width: number, height: number} | null} size */
export function showFacts(result, index, size) {
  const mask = result?.masks[index];
  const several = (result?.masks.length ?? 0) > 1;
  part("time").textContent = result ? duration(result.time_ms) : "–";
  const way = result ? Math.round(result.trip_ms - result.time_ms) : 0;
  part("trip").textContent = way > 0 ? `+ ${duration(way)} on the way` : "";
  part("score").textContent = mask?.score == null ? "–" : mask.score.toFixed(2);
  part("place").textContent = several ? `answer ${index + 1} of ${result.masks.length}` : "";
  part("area").textContent = mask ? `${whole(mask.area)} px` : "–";
  part("share").textContent = mask ? `${share(mask.area, size.width, size.height)} of the photo` : "";
  part("save-mask").disabled = part("save-cutout").disabled = !mask;
  part("next").disabled = !several;
  part("next").querySelector("span").textContent = several ? `Answer ${index + 1} of ${result.masks.length}` : "Other answer";
}

/** @param {Result} result @param {number} index @param {{width: number, height: number}} size @returns {string} */
export function inWords({ masks, time_ms }, index, { width, height }) {
  if (!masks.length) return `Nothing was found there (${duration(time_ms)}). Try another point, or draw a box.`;
  const { area, score } = masks[index];
  const parts = [`Mask of ${whole(area)} pixels, ${share(area, width, height)} of the photo`];
  if (score != null) parts.push(`score ${score.toFixed(2)}`);
  parts.push(index ? `answer ${index + 1} of ${masks.length}` : `in ${duration(time_ms)}`);
  return `${parts.join(", ")}.`;
}
