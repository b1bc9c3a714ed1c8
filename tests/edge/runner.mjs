// Runs the example for the tests, as wrangler.json says: src/ bundled, in workerd, with an R2 bucket that has two doors as in production.
// The Worker uses the binding, the daemon uses S3 (s3_door.mjs). More variables come in as JSON in EDGE_VARS; where both listen goes
// out as one line of JSON; the end of standard input ends it.
import { readFileSync } from "node:fs";
import { build } from "esbuild";
import { Miniflare } from "miniflare";
import { s3Door } from "./s3_door.mjs";

const config = JSON.parse(readFileSync("wrangler.json", "utf8"));
const [{ binding, bucket_name: bucketName }] = config.r2_buckets;

const bundle = await build({
  entryPoints: [config.main],
  bundle: true,
  format: "esm",
  target: "es2024",
  conditions: ["workerd", "browser"],
  write: false,
  logLevel: "warning",
});

const worker = new Miniflare({
  modules: true,
  script: bundle.outputFiles[0].text,
  compatibilityDate: config.compatibility_date,
  bindings: { ...config.vars, ...JSON.parse(process.env.EDGE_VARS) },
  r2Buckets: { [binding]: bucketName },
  host: "127.0.0.1",
  port: 0,
  cf: false, // else it would ask Cloudflare where we are
});

const url = (await worker.ready).origin;
const door = s3Door(await worker.getR2Bucket(binding), bucketName);
door.listen(0, "127.0.0.1", () => console.log(JSON.stringify({ url, s3: `http://127.0.0.1:${door.address().port}` })));

process.stdin.resume().on("end", async () => {
  door.close();
  door.closeAllConnections();
  await worker.dispose();
  process.exit(0);
});
