/**
 * One photo and its session: sent, kept open, and opened again without a word when the server has forgotten it.
 * The photo stays in the browser; the ticket stays in this tab, and the server's key never comes here.
 */

import * as api from "./api.js";

const STARTING_SECONDS_MAX = 120;
const TICKET = "ticket";

/**
 * @typedef {object} Hooks
 * @property {(share: number) => void} progress  of sending, 0 to 1
 * @property {(opened: api.Opened, again: boolean) => void} opened
 * @property {(error: api.ApiError) => void} starting  the server is not ready; it is asked again by itself
 */

/** @param {Hooks} hooks */
export function createSession(hooks) {
  let file = null;
  let opened = null;
  let opening = null;
  let sending = null;
  let failed = false;
  let usedAt = 0;

  /** Leave the last photo and its session, and send this one. @param {File} photo */
  function open(photo) {
    close();
    file = photo;
    return (opening = send(false));
  }

  /** Send the same photo again. */
  function reopen() {
    sending?.abort();
    failed = false;
    return (opening = send(opened !== null));
  }

  function close() {
    sending?.abort();
    if (opened) api.forget(opened.session_id);
    file = opened = opening = null;
    failed = false;
  }

  async function send(again) {
    const { signal } = (sending = new AbortController());
    const until = Date.now() + STARTING_SECONDS_MAX * 1000;
    for (;;) {
      try {
        const found = await api.upload(file, { ticket: ticket(), progress: hooks.progress, signal });
        opened = found;
        failed = false;
        usedAt = Date.now();
        hooks.opened(found, again);
        return found;
      } catch (error) {
        if (error.code !== "starting" || Date.now() > until) {
          if (!signal.aborted) (failed = true), (opened = null);
          throw error;
        }
        hooks.starting(error);
        await pause(error.retryAfter ?? 2, signal);
      }
    }
  }

  /**
   * Ask something of the session; waits until the photo is there, and sends it again when the session is gone.
   * @template T @param {(id: string) => Promise<T>} question @returns {Promise<T>}
   */
  async function ask(question) {
    if (failed) reopen();
    const { session_id: id } = await opening;
    let answer;
    try {
      answer = await question(id);
    } catch (error) {
      if (error.status !== 404 || !file) throw error;
      if (opened?.session_id === id) reopen(); // else another question has already done so
      answer = await question((await opening).session_id);
    }
    usedAt = Date.now();
    return answer;
  }

  return {
    open,
    reopen,
    close,
    ask,
    get opened() {
      return opened;
    },
    /** Seconds until the server forgets the session, when nobody asks. */
    get seconds() {
      return opened ? (usedAt + opened.life_ms - Date.now()) / 1000 : 0;
    },
  };
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => reject(new api.ApiError(0, "aborted")));
  });
}

let held = "";

/** The ticket of this tab, or "". */
function ticket() {
  try {
    return sessionStorage.getItem(TICKET) ?? held;
  } catch {
    return held;
  }
}

/** For this tab only, also when the page is loaded again. @param {string} text */
export function keepTicket(text) {
  held = text.trim();
  try {
    sessionStorage.setItem(TICKET, held);
  } catch {
    // The browser keeps nothing for this page: then the ticket lasts until the page is left.
  }
}

/** Take `#ticket=…` out of the address, so that neither history nor a copied link holds it. */
export function takeTicket() {
  const found = new URLSearchParams(location.hash.slice(1)).get("ticket");
  if (found === null) return false;
  keepTicket(found);
  history.replaceState(null, "", location.pathname + location.search);
  return true;
}
