/** Mouse, pen, fingers and keys on the photo, as what they mean. Places are shares of the photo, 0 to 1. */

const DRAG_PX = 6;
const DRAG_TOUCH_PX = 12;
const HOLD_MS = 450;
const STEP_PX = 12;
const FINE_PX = 1;
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** @typedef {import("./marks.js").Place} Place */
/**
 * @typedef {object} Meanings
 * @property {(place: Place, background: boolean) => void} point
 * @property {(from: Place, to: Place) => void} boxing  while it is drawn
 * @property {(from: Place, to: Place) => void} box
 * @property {() => void} cancelBox
 * @property {(place: Place | null) => void} hover
 * @property {(place: Place | null) => void} crosshair  where the keyboard points, null when it does not
 */

/**
 * A click is a point; the right button, Shift, Ctrl or a long touch make it background; a drag is a box.
 * @param {HTMLElement} stage @param {Meanings} on
 */
export function watchPointer(stage, on) {
  let start = null;

  const drop = () => {
    if (!start) return;
    clearTimeout(start.timer);
    if (start.boxing) on.cancelBox();
    start = null;
  };

  stage.addEventListener("pointerdown", (event) => {
    if (start) return drop(); // a second finger: this is a pinch, not a box
    if (event.button !== 0 && event.button !== 2) return;
    const background = event.button === 2 || event.shiftKey || event.ctrlKey;
    start = { id: event.pointerId, x: event.clientX, y: event.clientY, place: placeOf(stage, event), background };
    stage.setPointerCapture(event.pointerId);
    on.crosshair(null);
    if (event.pointerType === "touch") {
      start.timer = setTimeout(() => {
        navigator.vibrate?.(15);
        on.point(start.place, true);
        start = null;
      }, HOLD_MS);
    }
  });

  stage.addEventListener("pointermove", (event) => {
    if (!start) return on.hover(placeOf(stage, event));
    if (event.pointerId !== start.id || start.background) return;
    const far = event.pointerType === "touch" ? DRAG_TOUCH_PX : DRAG_PX;
    start.boxing ||= Math.hypot(event.clientX - start.x, event.clientY - start.y) > far;
    if (!start.boxing) return;
    clearTimeout(start.timer);
    on.boxing(start.place, placeOf(stage, event));
  });

  stage.addEventListener("pointerup", (event) => {
    if (event.pointerId !== start?.id) return;
    const { place, background, boxing, timer } = start;
    clearTimeout(timer);
    start = null;
    if (boxing) on.box(place, placeOf(stage, event));
    else on.point(place, background);
  });

  stage.addEventListener("pointercancel", drop);
  stage.addEventListener("pointerleave", () => start || on.hover(null));
  stage.addEventListener("contextmenu", (event) => event.preventDefault());
  stage.addEventListener("keydown", (event) => event.key === "Escape" && start && (event.stopPropagation(), drop()));
}

/**
 * Arrows move a crosshair, Enter is a click there, Shift+Enter a background one; B sets a box's two corners.
 * @param {HTMLElement} stage @param {Meanings} on
 */
export function watchKeys(stage, on) {
  let place = { x: 0.5, y: 0.5 };
  let corner = null;

  const move = (event) => {
    const [across, down] = ARROWS[event.key];
    const step = event.shiftKey ? FINE_PX : STEP_PX;
    place = {
      x: within(place.x + (across * step) / stage.clientWidth),
      y: within(place.y + (down * step) / stage.clientHeight),
    };
    on.crosshair(place);
    on.hover(place);
    if (corner) on.boxing(corner, place);
  };

  const setCorner = () => {
    on.crosshair(place);
    if (!corner) return on.boxing((corner = place), place);
    on.box(corner, place);
    corner = null;
  };

  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key in ARROWS) move(event);
    else if (event.key.toLowerCase() === "b") setCorner();
    else if (event.key === "Enter" && corner) setCorner();
    else if (event.key === "Enter") on.crosshair(place), on.point(place, event.shiftKey);
    else if (event.key === "Escape" && corner) (corner = null), on.cancelBox();
    else return;
    event.preventDefault();
    event.stopPropagation();
  });
  stage.addEventListener("focus", () => stage.matches(":focus-visible") && on.crosshair(place));
  stage.addEventListener("blur", () => {
    if (corner) on.cancelBox();
    corner = null;
    on.crosshair(null);
  });
  stage.addEventListener("pointerdown", (event) => {
    if (corner) on.cancelBox();
    corner = null;
    place = placeOf(stage, event);
  });
}

function placeOf(stage, { clientX, clientY }) {
  const { left, top, width, height } = stage.getBoundingClientRect();
  return { x: within((clientX - left) / width), y: within((clientY - top) / height) };
}

function within(share) {
  return Math.min(1, Math.max(0, share));
}
