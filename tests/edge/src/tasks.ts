// Tasks: a row is made by create_segmentation, which checks, charges and inserts at once; everything else only reads own rows.
import { type Ask, ApiError, ok } from "./envelope";
import { database, dataOf, type Reply, twice } from "./database";

// By name: users may not read all columns, so `*` is refused.
const TASK = "id, kind, status, error, charged, created_at, started_at, finished_at";
const RESULT = `${TASK}, project_id, source_image_url, text_prompt, params, mask_image_url, masks_url, result_image_url, labels, metadata`;
const FILES = { mask: "mask_image_url", masks: "masks_url", image: "result_image_url" } as const;
const UUID = /^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$/i;

type Row = Record<string, unknown> & { id: string; status: string };

export async function segment(c: Ask): Promise<Response> {
  const body = await shapeOf(c);
  const key = c.req.header("Idempotency-Key") ?? crypto.randomUUID();
  // Under one key the same request makes one task and one charge, however often it is sent; so it may be sent twice here.
  const ask = () => database(c).rpc("create_segmentation", { ...body, idempotency_key: key });
  const { id, ...task } = dataOf(await twice<Row>(ask)) as Row;
  return ok(c, { task_id: id, ...task, idempotency_key: key }, 202);
}

export async function task(c: Ask): Promise<Response> {
  return ok(c, await own(c, TASK));
}

export async function cancel(c: Ask): Promise<Response> {
  return ok(c, dataOf(await database(c).rpc("cancel_segmentation", { id: idOf(c) })));
}

export async function results(c: Ask): Promise<Response> {
  const [limit, offset] = [whole(c, "limit", 20, 1, 100), whole(c, "offset", 0, 0, 1_000_000)];
  const reply = await database(c)
    .from("segmentation_results")
    .select(RESULT, { count: "exact" })
    .eq("status", "done")
    .order("created_at", { ascending: false })
    .order("id")
    .range(offset, offset + limit - 1);
  if (reply.status === 416) return ok(c, { items: [], limit, offset, total: null }); // behind the last one
  return ok(c, { items: dataOf(reply as Reply<Row[]>), limit, offset, total: reply.count });
}

export async function result(c: Ask): Promise<Response> {
  return ok(c, await done(c));
}

/** The mask (PNG), the masks (COCO) or the made image, from the bucket; the row is read first, so only one's own. */
export async function file(c: Ask): Promise<Response> {
  const address = (await done(c))[FILES[c.req.param("file") as keyof typeof FILES]] as string | null;
  const found = address && (await c.env.BUCKET.get(keyOf(c, address)));
  if (!found) throw new ApiError(404, "file_unknown", "This task has made no such file.");
  const headers = new Headers({ ETag: found.httpEtag });
  found.writeHttpMetadata(headers);
  headers.set("Cache-Control", "private, max-age=31536000, immutable");
  return c.body(found.body, { headers });
}

/** The daemon writes R2_PUBLIC_URL/key where that is set, else the key. */
function keyOf(c: Ask, address: string): string {
  const prefix = `${c.env.R2_PUBLIC_URL}/`;
  return address.startsWith(prefix) ? address.slice(prefix.length) : address;
}

async function done(c: Ask): Promise<Row> {
  const row = await own(c, RESULT);
  if (row.status === "done") return row;
  throw new ApiError(409, "not_done", `This task is ${row.status}; ask /api/v1/tasks/${row.id} how it goes.`);
}

async function own(c: Ask, columns: string): Promise<Row> {
  const row = dataOf((await database(c).from("segmentation_results").select(columns).eq("id", idOf(c)).maybeSingle()) as Reply<Row>);
  if (!row) throw new ApiError(404, "task_unknown", "There is no such task among yours.");
  return row;
}

function idOf(c: Ask): string {
  const id = c.req.param("id") ?? "";
  if (!UUID.test(id)) throw new ApiError(404, "task_unknown", "There is no such task among yours.");
  return id;
}

/** The shape alone: what kinds there are and what they take is known to the database and the daemon. */
async function shapeOf(c: Ask): Promise<Record<string, unknown>> {
  const body: unknown = await c.req.json().catch(() => null);
  const wrong = (message: string) => new ApiError(400, "params_invalid", message);
  if (!isObject(body)) throw wrong("The body is no JSON object.");
  const { project_id, image_url, kind, text_prompt, params, after, ...rest } = body;
  if (Object.keys(rest).length) throw wrong(`There is no field "${Object.keys(rest)[0]}"; parameters of a kind go into params.`);
  for (const [name, value] of Object.entries({ project_id, after })) {
    if (value === undefined ? name === "project_id" : !UUID.test(String(value))) throw wrong(`${name} must be a UUID.`);
  }
  for (const [name, value] of Object.entries({ image_url, kind, text_prompt })) {
    if (value !== undefined && typeof value !== "string") throw wrong(`${name} must be a text.`);
  }
  if (params !== undefined && !isObject(params)) throw wrong("params must be a JSON object.");
  return { project_id, source_image_url: image_url, kind, text_prompt, params, after };
}

const isObject = (value: unknown): value is Record<string, unknown> =>
  typeof value === "object" && value !== null && !Array.isArray(value);

function whole(c: Ask, name: string, otherwise: number, least: number, most: number): number {
  const value = Number(c.req.query(name) ?? otherwise);
  if (Number.isInteger(value) && value >= least && value <= most) return value;
  throw new ApiError(400, "params_invalid", `${name} must be a whole number from ${least} to ${most}.`);
}
