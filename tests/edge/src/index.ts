// The Edge: every route that the app calls. It holds no service key: what a user may do is decided by their own token, in the database.
import { Hono } from "hono";
import { bodyLimit } from "hono/body-limit";
import { cors } from "hono/cors";
import { signedIn } from "./auth";
import { type App, ApiError, failed } from "./envelope";
import { cancel, file, result, results, segment, task } from "./tasks";
import { tooLarge, upload, uploadBytesMax } from "./upload";

const JSON_BYTES_MAX = 128 * 1024; // params may have 64 KB

const api = new Hono<App>().basePath("/api/v1");

api.use(cors()); // tokens travel in a header, never in a cookie, so any origin may ask
api.use(async (c, next) => {
  c.set("requestId", crypto.randomUUID());
  await next();
});
api.use(signedIn);

// One byte more than an image may have is not read; a form needs a little for itself.
api.post("/upload", (c, next) => bodyLimit({ maxSize: uploadBytesMax(c) + 4096, onError: tooLarge })(c, next), upload);
api.post("/segment", bodyLimit({ maxSize: JSON_BYTES_MAX, onError: tooLarge }), segment);
api.get("/tasks/:id", task);
api.post("/tasks/:id/cancel", cancel);
api.get("/results", results);
api.get("/results/:id", result);
api.get("/results/:id/:file{mask|masks|image}", file);

api.notFound((c) => failed(c, new ApiError(404, "route_unknown", "There is no such route; see the list of routes.")));
api.onError((error, c) => failed(c, error));

export default api;
