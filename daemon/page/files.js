/** Photos that come in: chosen, dropped anywhere, or pasted. */

import { part } from "./view.js";

/**
 * @param {(file: File) => void} take
 * @param {(text: string) => void} refuse  something that is no file came, in words
 */
export function watchFiles(take, refuse) {
  const input = part("file");
  for (const id of ["choose", "other"]) part(id).addEventListener("click", () => input.click());
  input.addEventListener("change", () => {
    const [chosen] = input.files;
    if (chosen) take(chosen);
    input.value = "";
  });

  document.addEventListener("paste", ({ clipboardData }) => {
    const [pasted] = clipboardData?.files ?? [];
    if (pasted) take(pasted);
  });

  let depth = 0; // dragging over a part inside another one enters twice and leaves twice
  const show = (now) => document.body.classList.toggle("dragging", (depth = now) > 0);
  document.addEventListener("dragenter", () => show(depth + 1));
  document.addEventListener("dragleave", () => show(depth - 1));
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    show(0);
    const [dropped] = event.dataTransfer?.files ?? [];
    if (dropped) take(dropped);
    else refuse("That was no file. Save the photo first, then drop it here.");
  });
}
