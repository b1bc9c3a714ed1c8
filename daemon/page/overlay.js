/** Draws masks over the photo: a clear colour, a line of that colour along the edge, and a white one outside of that. */

import { patchOf } from "./rle.js";

const FILL = 0.45;
const FILL_FAINT = 0.34;
const LINE_PX = 1.4;
const HALO_PX = 3;
const FAR = 255;

/** @typedef {{runs: import("./rle.js").Runs, colour: string, faint?: boolean}} Layer  colour is "#rrggbb" */

/**
 * Show `layers` on the canvas, which covers the photo exactly; the last one on top.
 * @param {HTMLCanvasElement} canvas @param {Layer[]} layers
 */
export function draw(canvas, layers) {
  fit(canvas);
  const context = canvas.getContext("2d");
  context.clearRect(0, 0, canvas.width, canvas.height);
  for (const layer of layers) {
    const { picture, x, y } = pictureOf(layer, canvas.width, canvas.height);
    context.drawImage(picture, x, y);
  }
}

/** As many pixels as the screen has where the canvas stands. */
function fit(canvas) {
  const width = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
  const height = Math.max(1, Math.round(canvas.clientHeight * devicePixelRatio));
  if (canvas.width !== width) canvas.width = width;
  if (canvas.height !== height) canvas.height = height;
}

/** The last picture of each mask: pointing at the same mask again draws nothing anew. */
const pictures = new WeakMap();

function pictureOf({ runs, colour, faint = false }, width, height) {
  const key = `${width} ${height} ${colour} ${faint} ${devicePixelRatio}`;
  const kept = pictures.get(runs);
  if (kept?.key === key) return kept;
  const made = { key, ...painted(patchOf(runs, width, height), colour, faint ? FILL_FAINT : FILL) };
  pictures.set(runs, made);
  return made;
}

function painted(patch, colour, fill) {
  const halo = HALO_PX * devicePixelRatio;
  const margin = Math.ceil(halo) + 1;
  const width = patch.width + 2 * margin;
  const height = patch.height + 2 * margin;
  const near = distances(patch, margin, width, height);
  const image = new ImageData(width, height);
  colourIn(image.data, patch, { near, margin, unit: FAR / (margin + 1), line: LINE_PX * devicePixelRatio, halo, colour, fill });
  const picture = document.createElement("canvas");
  picture.width = width;
  picture.height = height;
  picture.getContext("2d").putImageData(image, 0, 0);
  return { picture, x: patch.x - margin, y: patch.y - margin };
}

/** Per pixel how far the mask's edge is, in units of FAR / (margin + 1); FAR where it is farther than the margin. */
function distances({ width: columns, height: rows, alpha }, margin, width, height) {
  const near = new Uint8Array(width * height).fill(FAR);
  const disc = discOf(margin, width);
  const isIn = (place) => alpha[place] > 127;
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      const at = row * columns + column;
      if (!isIn(at)) continue;
      const whole = column && row && column < columns - 1 && row < rows - 1;
      if (whole && isIn(at - 1) && isIn(at + 1) && isIn(at - columns) && isIn(at + columns)) continue;
      const middle = (row + margin) * width + column + margin;
      for (let place = 0; place < disc.length; place += 2) {
        const to = middle + disc[place];
        if (near[to] > disc[place + 1]) near[to] = disc[place + 1];
      }
    }
  }
  return near;
}

/** Steps to the pixels of a disc and their distances, in turn. */
function discOf(radius, width) {
  const found = [];
  for (let y = -radius; y <= radius; y++) {
    for (let x = -radius; x <= radius; x++) {
      const distance = Math.hypot(x, y);
      if (distance <= radius) found.push(y * width + x, Math.round((distance * FAR) / (radius + 1)));
    }
  }
  return Int32Array.from(found);
}

/** Fill, white line and coloured line over each other, each as much as it covers of the pixel. */
function colourIn(data, patch, { near, margin, unit, line, halo, colour, fill }) {
  const pixels = new Uint32Array(data.buffer);
  const rgb = [1, 3, 5].map((place) => parseInt(colour.slice(place, place + 2), 16));
  // On every machine that browsers run on the lowest byte is red and the highest alpha.
  const plain = rgb[0] | (rgb[1] << 8) | (rgb[2] << 16);
  const width = patch.width + 2 * margin;
  for (let at = 0; at < pixels.length; at++) {
    const column = (at % width) - margin;
    const row = Math.floor(at / width) - margin;
    const outside = column < 0 || row < 0 || column >= patch.width || row >= patch.height;
    const share = outside ? 0 : patch.alpha[row * patch.width + column] / 255;
    if (near[at] === FAR) {
      pixels[at] = plain | ((share * fill * 255) << 24);
      continue;
    }
    const distance = near[at] / unit;
    const over = covered(line - distance);
    const white = covered(halo - distance) * (1 - share) * (1 - over);
    const under = share * fill * (1 - over);
    const alpha = over + white + under;
    const weight = alpha ? white / alpha : 0;
    for (let channel = 0; channel < 3; channel++) data[4 * at + channel] = rgb[channel] + (255 - rgb[channel]) * weight;
    data[4 * at + 3] = alpha * 255;
  }
}

function covered(inside) {
  return Math.min(1, Math.max(0, inside + 0.5));
}
