/** The server's routes as functions. Every failure is an ApiError; nothing is kept here. */

/** An answer that is no success; status 0 when there was none at all. */
export class ApiError extends Error {
  /** @param {number} status @param {string} code @param {{message?: string, request_id?: string}} body @param {number} [retryAfter] */
  constructor(status, code, body = {}, retryAfter = undefined) {
    super(body.message || code);
    this.status = status;
    this.code = code;
    this.detail = body.message || "";
    this.requestId = body.request_id;
    this.retryAfter = retryAfter;
  }
}

/**
 * @typedef {{session_id: string, width: number, height: number, expires_at: string, engine: string, model_id: string,
 *   embedding_cached: boolean, time_ms: number, life_ms: number}} Opened
 */

/**
 * Send a photo. `progress` gets shares from 0 to 1; at 1 the server is looking at the photo.
 * @param {File} file
 * @param {{ticket: string, progress: (share: number) => void, signal: AbortSignal}} options
 * @returns {Promise<Opened>}
 */
export function upload(file, { ticket, progress, signal }) {
  return new Promise((resolve, reject) => {
    const request = new XMLHttpRequest();
    request.open("POST", address());
    request.responseType = "json";
    if (ticket) request.setRequestHeader("X-Ticket", ticket);
    request.upload.addEventListener("progress", ({ loaded, total }) => progress(total ? loaded / total : 0));
    request.upload.addEventListener("load", () => progress(1));
    request.addEventListener("load", () => {
      const body = request.response;
      if (request.status === 200 && body) return resolve({ ...body, life_ms: life(body, request.getResponseHeader("Date")) });
      reject(refused(request.status, body, request.getResponseHeader("Retry-After")));
    });
    request.addEventListener("error", () => reject(new ApiError(0, "network")));
    request.addEventListener("abort", () => reject(new ApiError(0, "aborted")));
    signal.addEventListener("abort", () => request.abort());
    const form = new FormData();
    form.append("file", file);
    request.send(form);
  });
}

/** How long a session lives unused, by the server's clock alone. */
function life({ expires_at }, date) {
  const now = date ? Date.parse(date) : Date.now();
  return Math.max(0, Date.parse(expires_at) - now);
}

/** @param {string} id @param {object} prompt @returns {Promise<{masks: object[], engine: string, time_ms: number}>} */
export const predict = (id, prompt) => call("POST", `${id}/predict`, prompt);

/** @param {string} id */
export const look = (id) => call("GET", id);

/** @param {string} id */
export const everything = (id) => call("POST", `${id}/everything`, {});

/** @param {string} id @returns {Promise<{masks: {id: number, box: number[], area: number, score: number}[]}>} */
export const masks = (id) => call("GET", `${id}/masks`);

/** The smallest mask at a pixel, or null. @param {string} id @param {number} x @param {number} y */
export const maskAt = async (id, x, y) => (await call("GET", `${id}/mask?x=${x}&y=${y}`)).mask;

/** Say that a session is not needed any more; nobody waits for the answer. @param {string} id */
export function forget(id) {
  fetch(address(id), { method: "DELETE", keepalive: true }).catch(() => {});
}

async function call(method, path, body) {
  const json = body && { body: JSON.stringify(body), headers: { "Content-Type": "application/json" } };
  let answer;
  try {
    answer = await fetch(address(path), { method, cache: "no-store", ...json });
  } catch {
    throw new ApiError(0, "network");
  }
  const found = await answer.json().catch(() => null);
  if (answer.ok && found) return found;
  throw refused(answer.status, found, answer.headers.get("Retry-After"));
}

function refused(status, body, retryAfter) {
  const told = body?.error ?? {};
  return new ApiError(status || 502, told.code ?? "unreadable", told, Number(retryAfter) || undefined);
}

/** Beside the page, so that it also works under a path of another server. */
function address(path = "") {
  return new URL(path ? `session/${path}` : "session", document.baseURI);
}
