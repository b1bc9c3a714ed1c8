// The database, as the user who asks: their token goes along, row-level security does the rest.
import { createClient, type SupabaseClient } from "@supabase/supabase-js";
import { type Ask, ApiError } from "./envelope";

export interface Reply<T> {
  data: T | null;
  error: { code?: string; message: string; details?: string | null } | null;
  status: number;
}

export function database(c: Ask): SupabaseClient {
  const token = c.get("token");
  return createClient(c.env.SUPABASE_URL, c.env.SUPABASE_ANON_KEY, {
    accessToken: async () => token,
    auth: { persistSession: false, autoRefreshToken: false },
    db: { timeout: 8000, retry: false }, // the app asks again; nobody waits here for an outage to end
  });
}

/** Once more when the reply may have been lost. Only for what may be done twice without harm. */
export async function twice<T>(ask: () => PromiseLike<Reply<T>>): Promise<Reply<T>> {
  const reply = await ask();
  return reply.status === 0 || reply.status >= 502 ? ask() : reply;
}

/** The data of a reply. Throws the ApiError that an error amounts to. */
export function dataOf<T>({ data, error, status }: Reply<T>): T | null {
  if (!error) return data;
  if (error.code?.startsWith("PT4")) {
    // Raised by maskd's own functions: the status is in the code, our code in the details, a sentence in the message.
    throw new ApiError(Number(error.code.slice(2)) as 400, error.details || "refused", error.message);
  }
  if (status === 401) throw new ApiError(401, "unauthorized", "The token is not valid or has expired; sign in again.");
  if (status === 403) throw new ApiError(403, "forbidden", "This is not yours to do.");
  if (status === 400) throw new ApiError(400, "params_invalid", "The database cannot read the request; check ids and types.");
  console.error("database", status, error.code, error.message);
  throw new ApiError(503, "unavailable", "The database does not answer at the moment; try again soon.");
}
