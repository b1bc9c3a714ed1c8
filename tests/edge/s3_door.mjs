// R2's S3 address, which miniflare has not: the requests that the daemon's S3 client makes, on the bucket of the Worker's binding.
// It checks no signature and lists no more than one page.
import { createServer } from "node:http";
import { arrayBuffer } from "node:stream/consumers";

export function s3Door(bucket, bucketName) {
  return createServer(async (request, response) => {
    const url = new URL(request.url, "http://door");
    const [, name, ...parts] = url.pathname.split("/").map(decodeURIComponent);
    const answer = (status, body = "", headers = {}) => response.writeHead(status, headers).end(body);
    try {
      const body = await arrayBuffer(request);
      if (name !== bucketName) answer(404, error("NoSuchBucket"));
      else answer(...(await (parts.join("/") ? object : whole)(bucket, request, parts.join("/"), body, url.searchParams)));
    } catch (fault) {
      console.error(fault);
      answer(500, error("InternalError"));
    }
  });
}

async function object(bucket, { method, headers }, key, body) {
  if (method === "PUT") {
    const httpMetadata = { contentType: headers["content-type"], cacheControl: headers["cache-control"] };
    return [200, "", { ETag: (await bucket.put(key, body, { httpMetadata })).httpEtag }];
  }
  const found = await bucket.get(key);
  if (!found) return [404, error("NoSuchKey")];
  const facts = { ETag: found.httpEtag, "Content-Type": found.httpMetadata.contentType ?? "application/octet-stream" };
  return [200, Buffer.from(await found.arrayBuffer()), facts];
}

async function whole(bucket, { method }, _key, body, query) {
  if (method === "POST" && query.has("delete")) {
    await bucket.delete([...new TextDecoder().decode(body).matchAll(/<Key>(.*?)<\/Key>/g)].map(([, key]) => key));
    return [200, "<DeleteResult/>"];
  }
  const found = await bucket.list({ prefix: query.get("prefix") ?? "", limit: Number(query.get("max-keys") ?? 1000) });
  const entries = found.objects.map(({ key, size }) => `<Contents><Key>${key}</Key><Size>${size}</Size></Contents>`);
  return [200, `<ListBucketResult><IsTruncated>false</IsTruncated>${entries.join("")}</ListBucketResult>`];
}

const error = (code) => `<Error><Code>${code}</Code><Message>${code}</Message></Error>`;
