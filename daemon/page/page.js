/** The page: a photo, what the person points with, and the newest answer. Puts the other modules together. */

import * as api from "./api.js";
import { createEverything } from "./everything.js";
import { cutoutPng, maskPng, save } from "./export.js";
import { watchFiles } from "./files.js";
import { watchKeys, watchPointer } from "./gestures.js";
import { drawMarks } from "./marks.js";
import { draw } from "./overlay.js";
import { runsOf } from "./rle.js";
import { createSession, keepTicket, takeTicket } from "./session.js";
import * as steps from "./steps.js";
import * as view from "./view.js";
import { duration, problemOf, unfit } from "./words.js";

const { part } = view;
const HOVER_COLOUR = "#ff2e93";
const HINT = "Click on a thing, or draw a box around it.";
const UNSEEN = "This browser cannot show this kind of photo, but you can point at it. ";
const BUSY_AFTER_MS = 150;
const KEY = [...crypto.getRandomValues(new Uint32Array(4))].map((word) => word.toString(36)).join("");

/** @type {File | null} */
let file = null;
/** @type {steps.Step[]} */
let past = [steps.EMPTY];
let questions = 0;
let choosing = false;
let highlight = null;
let drawnBox = null;
let crosshair = null;
let retrying = null;

const session = createSession({
  progress: view.showSending,
  starting: (error) => view.say(problemOf(error).text),
  opened(found, again) {
    view.showSending(null);
    view.showRatio(found.width, found.height);
    view.showSession(found, file.name);
    if (!again && steps.isEmpty(now())) view.say(`${part("photo").src ? "" : UNSEEN}Ready in ${duration(found.time_ms)}. ${HINT}`);
    render();
  },
});
const everything = createEverything(session, (share) => (part("finding").value = share * 100));

const now = () => past[past.length - 1];
const size = () => session.opened ?? { width: part("photo").naturalWidth || 3, height: part("photo").naturalHeight || 2 };

const isSized = () => Boolean(file && (session.opened || part("photo").naturalWidth));

/* The photo */

/** @param {File | undefined} chosen */
async function take(chosen) {
  if (!chosen) return;
  const reason = unfit(chosen);
  if (reason) return view.showProblem(reason, undefined);
  view.hideProblem();
  leave();
  file = chosen;
  view.showPhoto(URL.createObjectURL(file), file.name);
  view.showSending(0);
  view.say("The photo is on its way. You may point at something already.");
  part("stage").focus({ preventScroll: true });
  render();
  await trying(() => session.open(chosen), upload);
}

/** Send the same photo again, then ask again what was asked last. */
async function upload() {
  view.hideProblem();
  await trying(async () => {
    await session.reopen();
    if (steps.canAsk(now()) && !now().result) await ask();
  }, upload);
}

function leave() {
  const { src } = part("photo");
  if (src) URL.revokeObjectURL(src);
  session.close();
  everything.reset();
  file = null;
  highlight = drawnBox = crosshair = null;
  past = [steps.EMPTY];
  questions++;
  part("finding").hidden = part("busy").hidden = true;
  setChoosing(false);
}

/** Run; an error is shown in words, with `again` behind its button. */
async function trying(action, again) {
  const asked = file;
  try {
    return await action();
  } catch (error) {
    if (error.code === "superseded" || error.code === "aborted" || file !== asked) return undefined;
    if (error.code === "not_generated") return findAgain();
    const problem = problemOf(error);
    if (!(error instanceof api.ApiError)) console.error(error);
    view.showSending(null);
    view.say("");
    if (problem.photo === "refused") {
      leave();
      view.showPhoto(null);
      part("choose").focus();
    }
    const next = session.opened ? again : upload;
    retrying = error.code === "network" ? next : null;
    view.showProblem(problem, next);
    return undefined;
  } finally {
    render();
  }
}

/* Pointing */

const pixel = ({ x, y }) => {
  const { width, height } = size();
  return { x: Math.min(width - 1, Math.floor(x * width)), y: Math.min(height - 1, Math.floor(y * height)) };
};

function addStep(step) {
  past = [...past, step];
  view.hideProblem();
  render();
  return ask();
}

function addPoint(place, background) {
  if (!isSized()) return undefined;
  if (choosing) return choose(place);
  const adds = document.querySelector("[name=sign]:checked").value === "1";
  return addStep(steps.withPoint(now(), { ...pixel(place), label: background || !adds ? 0 : 1 }));
}

function addBox(from, to) {
  drawnBox = null;
  if (!isSized()) return undefined;
  const { width, height } = size();
  const [x0, x1] = [from.x * width, to.x * width].sort((one, other) => one - other);
  const [y0, y1] = [from.y * height, to.y * height].sort((one, other) => one - other);
  if (x1 - x0 < 1 || y1 - y0 < 1) return render();
  setChoosing(false);
  return addStep(steps.withBox(now(), [x0, y0, x1, y1].map(Math.round)));
}

/** Ask the server what the last step means; only the newest answer is shown. */
async function ask() {
  const step = now();
  const mine = ++questions;
  if (!steps.canAsk(step)) return view.say("That was left out. Now click on the thing itself.");
  const soon = setTimeout(() => mine === questions && (part("busy").hidden = !session.opened), BUSY_AFTER_MS);
  const started = performance.now();
  await trying(async () => {
    const answer = await session.ask((id) => (mine === questions ? api.predict(id, steps.question(step, KEY)) : over()));
    if (mine !== questions) return;
    step.result = { ...answer, masks: answer.masks.map(withRuns), trip_ms: performance.now() - started };
    view.hideProblem();
    tell();
  }, ask);
  clearTimeout(soon);
  if (mine === questions) part("busy").hidden = true;
}

const withRuns = (mask) => ({ ...mask, runs: runsOf(mask.rle) });

function over() {
  throw new api.ApiError(409, "superseded");
}

function tell() {
  const { result, index } = now();
  if (result) view.say(view.inWords(result, index, size()));
}

function undo() {
  if (past.length < 2) return;
  settle(past.slice(0, -1));
  view.say(steps.isEmpty(now()) ? `Undone. ${HINT}` : "Undone.");
  if (!now().result && steps.canAsk(now())) ask();
  else tell();
}

function clear() {
  if (steps.isEmpty(now())) return void (choosing && toggleEverything());
  settle([...past, steps.EMPTY]);
  view.say(`Cleared. ${HINT}`);
}

function settle(kept) {
  past = kept;
  questions++;
  part("busy").hidden = true;
  view.hideProblem();
  render();
}

function nextAnswer() {
  const { result } = now();
  if ((result?.masks.length ?? 0) < 2) return;
  now().index = (now().index + 1) % result.masks.length;
  render();
  tell();
}

/* Everything */

async function toggleEverything() {
  if (!session.opened || everything.state === "running") return;
  if (choosing) {
    setChoosing(false);
    view.say(HINT);
    return;
  }
  if (everything.state === "done") {
    startChoosing();
    return;
  }
  part("finding").hidden = false;
  part("finding").value = 0;
  view.say("Looking for everything in the photo …");
  const running = trying(everything.run, toggleEverything);
  render();
  const count = await running;
  if (count === null) return;
  part("finding").hidden = true;
  render();
  if (count) startChoosing();
  else if (count === 0) view.say("Nothing was found in this photo.");
}

/** The server has forgotten what it had found. */
function findAgain() {
  everything.reset();
  setChoosing(false);
  toggleEverything();
}

function startChoosing() {
  setChoosing(true);
  view.say(`${everything.count} masks found. Point at a thing and click, or tap it, to choose its mask.`);
}

function setChoosing(on) {
  choosing = on;
  highlight = null;
  part("everything").setAttribute("aria-pressed", String(on));
  render();
}

async function hover(place) {
  if (!choosing || !place) return highlight && ((highlight = null), render());
  const { x, y } = pixel(place);
  const found = await trying(() => everything.under(x, y), undefined);
  if (found === undefined || !choosing) return undefined;
  if (crosshair) view.speak(found ? `A mask of ${found.area} pixels here` : "No mask here");
  if (found !== highlight) (highlight = found), render();
  return undefined;
}

async function choose(place) {
  const { x, y } = pixel(place);
  const started = performance.now();
  const found = await trying(() => everything.at(x, y), undefined);
  if (found === undefined) return;
  if (!found) return view.say("No mask was found there. Point at another place.");
  const { engine, model_id } = session.opened;
  const passed = performance.now() - started;
  past = [...past, steps.chosen(found, { engine, model_id, time_ms: passed, trip_ms: passed })];
  highlight = null;
  render();
  tell();
}

/* Showing */

function render() {
  const { width, height } = size();
  const step = now();
  const { result, index } = shown();
  const mask = result?.masks[index];
  const layers = mask ? [{ runs: mask.runs, colour: part("colour").value }] : [];
  if (highlight) layers.push({ runs: highlight.runs, colour: HOVER_COLOUR, faint: true });
  draw(part("mask"), layers);
  const box = drawnBox ?? (step.box && [step.box[0] / width, step.box[1] / height, step.box[2] / width, step.box[3] / height]);
  const points = step.points.map(({ x, y, label }) => ({ x: (x + 0.5) / width, y: (y + 0.5) / height, label }));
  drawMarks(part("marks"), { points, box, crosshair });
  view.showFacts(result, index, { width, height });
  part("undo").disabled = past.length < 2;
  part("clear").disabled = steps.isEmpty(step);
  part("everything").disabled = !session.opened || everything.state === "running";
}

/** While an answer is awaited the one before stays, so that nothing flickers. */
function shown() {
  const step = now();
  return step.result || !steps.canAsk(step) ? step : (past[past.length - 2] ?? step);
}

async function download(make, ending) {
  const { result, index } = shown();
  const mask = result?.masks[index];
  if (!mask) return;
  await trying(async () => save(await make(mask.runs, part("photo")), `${file.name.replace(/\.[^.]*$/, "")}-${ending}.png`));
}

/* What the person does */

const meanings = {
  point: addPoint,
  boxing: (from, to) => ((drawnBox = [from.x, from.y, to.x, to.y]), inOrder(drawnBox), render()),
  box: addBox,
  cancelBox: () => ((drawnBox = null), render()),
  hover,
  crosshair(place) {
    crosshair = file && place;
    if (crosshair && !choosing) view.speak(Object.values(pixel(place)).join(", "));
    render();
  },
};
watchFiles(take, (text) => view.showProblem({ text }, undefined));
watchPointer(part("stage"), meanings);
watchKeys(part("stage"), meanings);

function inOrder(box) {
  const [x0, y0, x1, y1] = box;
  box.splice(0, 4, Math.min(x0, x1), Math.min(y0, y1), Math.max(x0, x1), Math.max(y0, y1));
}

const actions = {
  dismiss: view.hideProblem,
  undo,
  clear,
  next: nextAnswer,
  everything: toggleEverything,
  "save-mask": () => download(maskPng, "mask"),
  "save-cutout": () => download(cutoutPng, "cutout"),
};
for (const [id, action] of Object.entries(actions)) part(id).addEventListener("click", () => action());

part("colour").addEventListener("input", render);
part("photo").addEventListener("load", () => (view.showRatio(size().width, size().height), render()));
part("photo").addEventListener("error", () => part("photo").removeAttribute("src"));
part("ticket").addEventListener("submit", (event) => {
  event.preventDefault();
  keepTicket(part("ticket-text").value);
  part("ticket").reset();
  upload();
});

const SHORTCUTS = { n: nextAnswer, e: toggleEverything, d: actions["save-mask"] };
part("stage").addEventListener("keydown", (event) => {
  if (!event.ctrlKey && !event.metaKey && !event.altKey) SHORTCUTS[event.key.toLowerCase()]?.();
});
document.addEventListener("keydown", (event) => {
  if (!file || event.target.matches("input:not([type=radio])")) return;
  if (event.key === "Escape") clear();
  if ((event.ctrlKey || event.metaKey) && !event.shiftKey && event.key.toLowerCase() === "z") event.preventDefault(), undo();
});

window.addEventListener("online", () => retrying && (view.hideProblem(), retrying(), (retrying = null)));
window.addEventListener("hashchange", () => takeTicket() && file && !session.opened && upload());
window.addEventListener("resize", render);
window.addEventListener("pagehide", ({ persisted }) => persisted || session.close());
new ResizeObserver(render).observe(part("stage"));
setInterval(() => session.opened && view.showRemaining(session.seconds), 1000);
takeTicket();
