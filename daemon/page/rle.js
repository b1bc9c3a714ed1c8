/**
 * Masks as COCO run lengths: read, asked for one pixel, and drawn at the size of the screen or of the photo.
 *
 * COCO counts pixels column by column from the top left, starting with those outside; its compressed form is 5 bits a
 * character from "0", with deltas to the count two before from the fourth on (maskApi.c of cocoapi).
 */

/** @typedef {{size: [number, number], counts: string | number[]}} Rle  size is [height, width] */
/** @typedef {{width: number, height: number, ends: Uint32Array, box: number[]}} Runs  ends[i] is where run i ends */
/** @typedef {{x: number, y: number, width: number, height: number, alpha: Uint8ClampedArray}} Patch */

/** @param {string} text @returns {number[]} */
export function expanded(text) {
  const counts = [];
  let value = 0;
  let shift = 0;
  for (let place = 0; place < text.length; place++) {
    const bits = text.charCodeAt(place) - 48;
    value |= (bits & 31) << shift;
    shift += 5;
    if (bits & 32) continue;
    if (bits & 16 && shift < 32) value |= -1 << shift;
    counts.push(counts.length > 2 ? value + counts[counts.length - 2] : value);
    value = shift = 0;
  }
  return counts;
}

/** @param {Rle} rle @returns {Runs} with the box [x0, y0, x1, y1] around what is inside, x1 and y1 just outside of it */
export function runsOf(rle) {
  const [height, width] = rle.size;
  const counts = typeof rle.counts === "string" ? expanded(rle.counts) : rle.counts;
  const ends = new Uint32Array(counts.length);
  let end = 0;
  counts.forEach((count, place) => (ends[place] = end += count));
  const runs = { width, height, ends, box: [width, height, 0, 0] };
  eachSpan(runs, (x, top, bottom) => {
    const box = runs.box;
    box[0] = Math.min(box[0], x);
    box[1] = Math.min(box[1], top);
    box[2] = Math.max(box[2], x + 1);
    box[3] = Math.max(box[3], bottom);
  });
  return runs;
}

/** Call `span(x, top, bottom)` for each vertical stretch inside the mask. @param {Runs} runs @param {Function} span */
function eachSpan({ ends, height }, span) {
  for (let place = 1; place < ends.length; place += 2) {
    let from = ends[place - 1];
    while (from < ends[place]) {
      const x = Math.floor(from / height);
      const until = Math.min(ends[place], (x + 1) * height);
      span(x, from - x * height, until - x * height);
      from = until;
    }
  }
}

/** Whether a pixel is inside, by halving. @param {Runs} runs @param {number} x @param {number} y */
export function isInside({ ends, height }, x, y) {
  const pixel = Math.floor(x) * height + Math.floor(y);
  let low = 0;
  let high = ends.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (ends[middle] > pixel) high = middle;
    else low = middle + 1;
  }
  return low < ends.length && low % 2 === 1;
}

/**
 * The part of the mask's picture that is not empty, for a photo shown with `width` x `height` pixels. Smaller than the
 * photo, each pixel is the share of it that is covered; larger, edges are drawn smooth instead of in steps.
 * @param {Runs} runs @param {number} width @param {number} height @returns {Patch}
 */
export function patchOf(runs, width, height) {
  const small = shares(runs, Math.min(width, runs.width), Math.min(height, runs.height));
  return small.wholeWidth === width && small.wholeHeight === height ? toAlpha(small) : enlarged(small, width, height);
}

function shares(runs, width, height) {
  const across = width / runs.width;
  const down = height / runs.height;
  const [x0, y0, x1, y1] = runs.box;
  const x = Math.floor(x0 * across);
  const y = Math.floor(y0 * down);
  const columns = Math.max(1, Math.min(width, Math.ceil(x1 * across)) - x);
  const rows = Math.max(1, Math.min(height, Math.ceil(y1 * down)) - y);
  const values = new Float32Array(columns * rows);
  const weights = weightsOf(runs.width, width);
  eachSpan(runs, (column, top, bottom) => {
    const to = Math.floor((column + 0.5) * across);
    const at = Math.min(columns - 1, to - x);
    const from = top * down - y;
    const until = Math.min(rows, bottom * down - y);
    for (let row = Math.floor(from); row < until; row++) {
      values[row * columns + at] += weights[to] * (Math.min(until, row + 1) - Math.max(from, row));
    }
  });
  return { x, y, width: columns, height: rows, values, wholeWidth: width, wholeHeight: height };
}

/** Per column of the smaller picture one by the number of the photo's columns that fall into it. */
function weightsOf(many, few) {
  const weights = new Float32Array(few);
  for (let column = 0; column < many; column++) weights[Math.floor(((column + 0.5) * few) / many)]++;
  return weights.map((count) => 1 / count);
}

function toAlpha({ x, y, width, height, values }) {
  const alpha = new Uint8ClampedArray(values.length);
  values.forEach((value, place) => (alpha[place] = value * 255));
  return { x, y, width, height, alpha };
}

function enlarged(small, width, height) {
  const across = axis(small.x, small.width, small.wholeWidth, width);
  const down = axis(small.y, small.height, small.wholeHeight, height);
  const alpha = new Uint8ClampedArray(across.count * down.count);
  const steep = Math.max(width / small.wholeWidth, height / small.wholeHeight);
  const stride = small.width + 4;
  const values = new Float32Array(stride * (small.height + 4)); // with an empty edge, so that none needs to be checked
  for (let row = 0; row < small.height; row++) {
    values.set(small.values.subarray(row * small.width, (row + 1) * small.width), (row + 2) * stride + 2);
  }
  for (let row = 0; row < down.count; row++) {
    const start = down.before[row] * stride;
    const below = down.share[row];
    for (let column = 0; column < across.count; column++) {
      const at = start + across.before[column];
      const right = across.share[column];
      const upper = values[at] + (values[at + 1] - values[at]) * right;
      const lower = values[at + stride] + (values[at + stride + 1] - values[at + stride]) * right;
      alpha[row * across.count + column] = ((upper + (lower - upper) * below - 0.5) * steep + 0.5) * 255;
    }
  }
  return { x: across.first, y: down.first, width: across.count, height: down.count, alpha };
}

/** Along one side: which of the large pixels are drawn, and between which two of the small ones each lies, and where. */
function axis(from, length, whole, large) {
  const scale = large / whole;
  const first = Math.max(0, Math.floor((from - 1) * scale));
  const count = Math.min(large, Math.ceil((from + length + 1) * scale)) - first;
  const before = new Int32Array(count);
  const share = new Float32Array(count);
  for (let place = 0; place < count; place++) {
    const exact = Math.min(length + 1, Math.max(-2, (first + place + 0.5) / scale - 0.5 - from));
    before[place] = Math.min(length, Math.floor(exact)) + 2;
    share[place] = exact + 2 - before[place];
  }
  return { first, count, before, share };
}

/** The pixels of the mask in its own box, as large as in the photo. @param {Runs} runs @returns {Patch} */
export function exactPatch(runs) {
  const [x, y, x1, y1] = runs.box;
  const width = Math.max(0, x1 - x);
  const height = Math.max(0, y1 - y);
  const alpha = new Uint8ClampedArray(width * height);
  eachSpan(runs, (column, top, bottom) => {
    for (let row = top - y; row < bottom - y; row++) alpha[row * width + column - x] = 255;
  });
  return { x, y, width, height, alpha };
}

/** @param {Patch} patch @returns {HTMLCanvasElement} white where the mask is, transparent elsewhere */
export function canvasOf({ width, height, alpha }) {
  const canvas = document.createElement("canvas");
  canvas.width = Math.max(1, width);
  canvas.height = Math.max(1, height);
  const image = new ImageData(canvas.width, canvas.height);
  const pixels = new Uint32Array(image.data.buffer);
  // The bytes are red, green, blue, alpha; on every machine that browsers run on the last one is the highest.
  for (let place = 0; place < alpha.length; place++) pixels[place] = (alpha[place] << 24) | 0xffffff;
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
