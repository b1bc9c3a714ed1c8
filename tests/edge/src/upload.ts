// POST /upload: an image, as the body itself or as `file` of a form, is put under the user's own prefix.
import { type Ask, ApiError, ok } from "./envelope";

export const uploadBytesMax = (c: Ask): number => Number(c.env.UPLOAD_BYTES_MAX ?? 20 * 1024 * 1024);

export function tooLarge(): never {
  throw new ApiError(413, "too_large", "The request is too large; send a smaller image, or fewer parameters.");
}

export async function upload(c: Ask): Promise<Response> {
  const bytes = await bytesOf(c);
  if (bytes.byteLength > uploadBytesMax(c)) tooLarge();
  const type = typeOf(bytes);
  if (!type) throw new ApiError(415, "image_invalid", "That is no image that is read here; send JPEG, PNG, WEBP or HEIC.");
  // Nobody chooses a key: it lies under the owner's prefix, where the database lets tasks look, and is never written twice.
  const key = `uploads/${c.get("userId")}/${crypto.randomUUID()}.${type.extension}`;
  await c.env.BUCKET.put(key, bytes, { httpMetadata: { contentType: type.mime } });
  return ok(c, { image_url: key, content_type: type.mime, bytes: bytes.byteLength }, 201);
}

async function bytesOf(c: Ask): Promise<Uint8Array> {
  if (!c.req.header("Content-Type")?.startsWith("multipart/form-data")) return new Uint8Array(await c.req.arrayBuffer());
  const file = (await c.req.parseBody()).file;
  if (!(file instanceof File)) throw new ApiError(400, "params_invalid", "The form has no image; send it as `file`.");
  return new Uint8Array(await file.arrayBuffer());
}

/** What the first bytes say. The name and the Content-Type are the caller's word only. */
function typeOf(bytes: Uint8Array): { mime: string; extension: string } | undefined {
  const start = String.fromCharCode(...bytes.subarray(0, 12));
  if (start.startsWith("\xff\xd8\xff")) return { mime: "image/jpeg", extension: "jpg" };
  if (start.startsWith("\x89PNG\r\n\x1a\n")) return { mime: "image/png", extension: "png" };
  if (/^RIFF[^]{4}WEBP/.test(start)) return { mime: "image/webp", extension: "webp" };
  if (/^[^]{4}ftyp(heic|heix|mif1)/.test(start)) return { mime: "image/heic", extension: "heic" };
}
