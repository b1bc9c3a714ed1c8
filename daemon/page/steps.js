/** What the person pointed with, step by step, so that each can be undone. Values only. */

/**
 * @typedef {object} Step
 * @property {{x: number, y: number, label: number}[]} points  in pixels of the photo
 * @property {number[] | null} box
 * @property {object | null} mask  a mask to go on from, as the server takes it
 * @property {import("./view.js").Result | null} result  kept, so that undoing asks nobody
 * @property {number} index  which of the answers is shown
 */

/** @type {Step} */
export const EMPTY = Object.freeze({ points: [], box: null, mask: null, result: null, index: 0 });

/** @param {Step} step @param {{x: number, y: number, label: number}} point @returns {Step} */
export const withPoint = (step, point) => ({ ...fresh(step), points: [...step.points, point] });

/** @param {Step} step @param {number[]} box @returns {Step} */
export const withBox = (step, box) => ({ ...fresh(step), box });

/** A mask that was found without a prompt. @param {object} mask @param {object} facts @returns {Step} */
export const chosen = (mask, facts) => ({ ...EMPTY, mask: { rle: mask.rle }, result: { masks: [mask], ...facts } });

/** The same prompt without its answer; when another than the best answer was picked, the next one goes on from it. */
function fresh(step) {
  const picked = step.index > 0 ? step.result.masks[step.index].mask_ref : step.mask;
  return { ...step, mask: picked, result: null, index: 0 };
}

/** @param {Step} step */
export const isEmpty = (step) => !step.points.length && !step.box && !step.mask;

/** Whether there is something to look for, not only to leave out. @param {Step} step */
export const canAsk = (step) => Boolean(step.box || step.mask || step.points.some(({ label }) => label));

/** The body of the question. A lone point is ambiguous, so three answers are wanted. @param {Step} step @param {string} key */
export function question({ points, box, mask }, key) {
  const lone = points.length === 1 && !box && !mask;
  return {
    ...(points.length && { points }),
    ...(box && { box }),
    ...(mask && { mask }),
    ...(lone && { multimask: true }),
    format: "rle",
    supersede: key,
  };
}
