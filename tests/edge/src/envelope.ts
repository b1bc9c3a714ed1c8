// The one form of every JSON answer, and what the Worker is given.
import type { Context } from "hono";
import type { ContentfulStatusCode } from "hono/utils/http-status";

export interface Env {
  BUCKET: R2Bucket;
  SUPABASE_URL: string;
  SUPABASE_ANON_KEY: string; // sb_publishable_… or the legacy anon key: it may be public
  SUPABASE_JWT_SECRET?: string; // only for projects whose users' tokens are still signed with HS256
  R2_PUBLIC_URL?: string; // as the daemon has it
  UPLOAD_BYTES_MAX?: string;
}

export type App = { Bindings: Env; Variables: { requestId: string; userId: string; token: string } };
export type Ask = Context<App>;

/** An answer other than success: a code for the program, a sentence for the person. */
export class ApiError extends Error {
  constructor(
    readonly status: ContentfulStatusCode,
    readonly code: string,
    message: string,
  ) {
    super(message);
  }
}

export function ok(c: Ask, data: unknown, status: ContentfulStatusCode = 200): Response {
  return c.json({ success: true, data, error: null, meta: meta(c) }, status);
}

export function failed(c: Ask, error: Error): Response {
  if (!(error instanceof ApiError)) {
    console.error(c.get("requestId"), error); // for the log alone: the app learns nothing of our insides
    error = new ApiError(500, "internal", "That is our fault; try again, and tell us the request_id if it stays.");
  }
  const { status, code, message } = error as ApiError;
  if (status === 429 || status === 503) c.header("Retry-After", "5");
  return c.json({ success: false, data: null, error: { code, message }, meta: meta(c) }, status);
}

const meta = (c: Ask) => ({ request_id: c.get("requestId"), timestamp: new Date().toISOString() });
