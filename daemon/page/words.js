/** Numbers and errors in words that a person can use. Nothing here touches the page. */

export const UPLOAD_BYTES_MAX = 20_000_000;

const NUMBER = new Intl.NumberFormat("en");

/** @typedef {{text: string, retry?: string, ask?: "ticket", photo?: "refused"}} Problem */

/** @param {number} value */
export const whole = (value) => NUMBER.format(Math.round(value));

/** @param {number} ms */
export const duration = (ms) => (ms < 1000 ? `${whole(ms)} ms` : `${(ms / 1000).toFixed(ms < 10_000 ? 2 : 1)} s`);

/** @param {number} bytes */
export const megabytes = (bytes) => `${(bytes / 1e6).toFixed(1)} MB`;

/** @param {number} area @param {number} width @param {number} height */
export function share(area, width, height) {
  const percent = (100 * area) / (width * height);
  return `${percent < 10 ? percent.toFixed(1) : Math.round(percent)} %`;
}

/** @param {number} seconds */
export function remaining(seconds) {
  if (seconds <= 0) return "over; the next click opens a new one";
  return seconds < 60 ? `open for ${Math.ceil(seconds)} s more` : `open for ${Math.round(seconds / 60)} min more`;
}

/** What is wrong with a file before it is sent, or null. @param {File} file @returns {Problem | null} */
export function unfit(file) {
  if (file.size > UPLOAD_BYTES_MAX) {
    const most = megabytes(UPLOAD_BYTES_MAX).replace(".0", "");
    return { text: `“${file.name}” is too large: it has ${megabytes(file.size)}, and at most ${most} can be uploaded. Save it smaller, or as a JPEG.` };
  }
  return file.size === 0 ? { text: `“${file.name}” is empty, or a folder. Choose a photo.` } : null;
}

/** @param {import("./api.js").ApiError} error @returns {Problem} */
export function problemOf(error) {
  const { status = 0, code, detail = "", requestId, retryAfter } = error;
  const told = detail ? ` ${detail}` : "";
  switch (status) {
    case 0:
      return code === "network"
        ? { text: "The server cannot be reached. Is the network there, and the server running?", retry: "Try again" }
        : { text: `Something went wrong on this page: ${error.message}`, retry: "Try again" };
    case 401:
      return { text: "This server asks for a ticket. Paste the one you were given; tickets last an hour at most.", ask: "ticket" };
    case 403:
      return { text: `The server refuses this.${told}` };
    case 404:
      return { text: "This photo's session is over.", retry: "Upload it again" };
    case 413:
      return { text: `This photo is too large for the server.${told}`, photo: "refused" };
    case 415:
      return { text: `This file is not a photo that the server can read.${told || " JPEG, PNG and WebP always work."}`, photo: "refused" };
    case 429:
      return { text: `The server ${code === "sessions_full" ? "is full" : "has too much to do"} at the moment.${waiting(retryAfter)}`, retry: "Try again" };
    case 503:
      return { text: code === "starting" ? "The server is starting and will be ready in a moment." : `The server cannot answer now.${told}`, retry: "Try again" };
    case 500:
      return { text: `Something went wrong on the server.${requestId ? ` Its log has more under ${requestId}.` : ""}`, retry: "Try again" };
    default:
      return { text: detail || `The server answered with ${status}.`, retry: status >= 500 || status === 408 ? "Try again" : undefined };
  }
}

function waiting(seconds) {
  return seconds ? ` It may have room in ${seconds} s.` : " It may have room in a moment.";
}
