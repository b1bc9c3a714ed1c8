/** "Everything": let the server find all masks of a photo, then tell which one lies under the pointer. */

import * as api from "./api.js";
import { isInside, runsOf } from "./rle.js";

const POLL_MS = 350;

/** @typedef {{id: number, score: number, box: number[], area: number, rle: object, runs: import("./rle.js").Runs}} Found */

/**
 * @param {ReturnType<typeof import("./session.js").createSession>} session
 * @param {(share: number) => void} progress
 */
export function createEverything(session, progress) {
  let state = "none";
  let all = [];
  let known = new Map();
  let round = 0;
  let wanted = null;
  let asking = null;

  /** Forget what was found: the photo is another one, or its session. */
  function reset() {
    round++;
    state = "none";
    all = [];
    known = new Map();
    wanted = null;
  }

  /** Find all masks; the number of them, or null when the photo changed meanwhile. @returns {Promise<number | null>} */
  async function run() {
    reset();
    const mine = round;
    state = "running";
    try {
      await session.ask(api.everything);
      for (;;) {
        const { everything } = await session.ask(api.look);
        if (mine !== round) return null;
        if (everything.status === "none") await session.ask(api.everything);
        if (everything.status === "failed") throw new api.ApiError(500, "everything_failed");
        if (everything.status === "done") break;
        progress(everything.progress);
        await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      }
      const { masks } = await session.ask(api.masks);
      if (mine !== round) return null;
      all = [...masks].sort((one, other) => one.area - other.area);
      state = "done";
      return all.length;
    } catch (error) {
      if (mine === round) state = "none";
      throw error;
    }
  }

  /**
   * The smallest mask at a pixel: from memory where that is certain, else from the server.
   * @param {number} x @param {number} y @returns {Promise<Found | null>}
   */
  async function at(x, y) {
    const remembered = fromMemory(x, y);
    if (remembered !== undefined) return remembered;
    const now = round;
    const mask = await session.ask((id) => api.maskAt(id, x, y));
    if (!mask) return null;
    const found = known.get(mask.id) ?? { ...mask, runs: runsOf(mask.rle) };
    if (now === round) known.set(found.id, found);
    return found;
  }

  /**
   * The same for a pointer that moves: one question at a time, then only the newest of those that came meanwhile.
   * Undefined when there is a newer one.
   * @param {number} x @param {number} y @returns {Promise<Found | null | undefined>}
   */
  async function under(x, y) {
    const mine = (wanted = { x, y });
    while (asking && fromMemory(x, y) === undefined) {
      await asking.catch(() => {});
      if (wanted !== mine) return undefined;
    }
    const answer = at(x, y);
    asking = answer;
    try {
      const found = await answer;
      return wanted === mine ? found : undefined;
    } finally {
      if (asking === answer) asking = null;
    }
  }

  function fromMemory(x, y) {
    for (const { id, box } of all) {
      if (x < box[0] - 1 || y < box[1] - 1 || x > box[2] + 1 || y > box[3] + 1) continue;
      const mask = known.get(id);
      if (!mask) return undefined;
      if (isInside(mask.runs, x, y)) return mask;
    }
    return null;
  }

  return {
    run,
    at,
    under,
    reset,
    get state() {
      return state;
    },
    get count() {
      return all.length;
    },
  };
}
