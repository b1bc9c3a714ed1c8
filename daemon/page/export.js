/** Masks and cut-outs as PNG files, as large as in the photo. */

import { canvasOf, exactPatch } from "./rle.js";

/** White on black, the size of the photo. @param {import("./rle.js").Runs} runs @returns {Promise<Blob>} */
export function maskPng(runs) {
  const patch = exactPatch(runs);
  const canvas = blank(runs.width, runs.height);
  const context = canvas.getContext("2d");
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(canvasOf(patch), patch.x, patch.y);
  return png(canvas);
}

/**
 * The thing alone, transparent around it, in its own box.
 * @param {import("./rle.js").Runs} runs @param {HTMLImageElement} photo @returns {Promise<Blob>}
 */
export async function cutoutPng(runs, photo) {
  await photo.decode();
  const patch = exactPatch(runs);
  const canvas = canvasOf(patch);
  const context = canvas.getContext("2d");
  context.globalCompositeOperation = "source-in";
  context.drawImage(photo, -patch.x, -patch.y, runs.width, runs.height);
  return png(canvas);
}

/** Hand a file to the person. @param {Blob} blob @param {string} name */
export function save(blob, name) {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(blob);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000);
}

function blank(width, height) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = height;
  return canvas;
}

function png(canvas) {
  return new Promise((resolve, reject) => {
    const failed = () => reject(new Error("this browser cannot make a picture of that size"));
    canvas.toBlob((blob) => (blob ? resolve(blob) : failed()), "image/png");
  });
}
