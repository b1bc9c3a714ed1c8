/** Draws what the person points with: points, a box, and the crosshair that the keyboard moves. */

const SVG = "http://www.w3.org/2000/svg";
const RADIUS = 9;
const ARM = 4.5;
const GAP = 12;

/** @typedef {{x: number, y: number}} Place  in shares of the photo, 0 to 1 */
/** @typedef {{points: {x: number, y: number, label: number}[], box: number[] | null, crosshair: Place | null}} Marks */

/**
 * @param {SVGSVGElement} svg which covers the photo exactly
 * @param {Marks} marks everything in shares of the photo
 */
export function drawMarks(svg, { points, box, crosshair }) {
  const width = svg.clientWidth || 1;
  const height = svg.clientHeight || 1;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(
    ...(box ? boxOf(box[0] * width, box[1] * height, box[2] * width, box[3] * height) : []),
    ...points.map(({ x, y, label }) => pointOf(x * width, y * height, label)),
    ...(crosshair ? crossOf(crosshair.x * width, crosshair.y * height, width, height) : []),
  );
}

function boxOf(x0, y0, x1, y1) {
  const corners = `${x0},${y0} ${x1},${y0} ${x1},${y1} ${x0},${y1}`;
  return ["under", "over"].map((layer) => element("polygon", { class: `box ${layer}`, points: corners }));
}

/** A green plus for foreground, a red minus for background. */
function pointOf(x, y, label) {
  const group = element("g", { class: label ? "yes" : "no" });
  const upright = label ? `M${x} ${y - ARM}v${2 * ARM}` : "";
  group.append(element("circle", { cx: x, cy: y, r: RADIUS }), element("path", { d: `M${x - ARM} ${y}h${2 * ARM}${upright}` }));
  return group;
}

function crossOf(x, y, width, height) {
  const lines = `M0 ${y}H${x - GAP}M${x + GAP} ${y}H${width}M${x} 0V${y - GAP}M${x} ${y + GAP}V${height}`;
  const ring = `M${x - GAP} ${y}a${GAP} ${GAP} 0 1 0 ${2 * GAP} 0a${GAP} ${GAP} 0 1 0 ${-2 * GAP} 0M${x - 1} ${y}h2`;
  return ["under", "over"].map((layer) => element("path", { class: `cross ${layer}`, d: lines + ring }));
}

function element(name, attributes) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, String(value));
  return made;
}
