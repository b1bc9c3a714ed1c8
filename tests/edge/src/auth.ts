// Who calls: the Supabase token is checked here, so that nothing else happens for a stranger, and then passed on to the database.
import { createMiddleware } from "hono/factory";
import { createRemoteJWKSet, errors, jwtVerify, type JWTVerifyGetKey } from "jose";
import { type App, ApiError, type Env } from "./envelope";

// One per isolate. jose keeps the project's public keys for ten minutes, and fetches them again when a token names a new one.
const keySets = new Map<string, JWTVerifyGetKey>();
const NOT_THE_TOKENS_FAULT = ["ERR_JOSE_GENERIC", "ERR_JWKS_TIMEOUT", "ERR_JWKS_INVALID"];

export const signedIn = createMiddleware<App>(async (c, next) => {
  const token = c.req.header("Authorization")?.match(/^Bearer ([\w.-]+)$/i)?.[1];
  if (!token) throw new ApiError(401, "unauthorized", "Sign in first: send the header Authorization: Bearer <token>.");
  c.set("userId", await userOf(token, c.env));
  c.set("token", token);
  await next();
});

/** The id of the user whose token this is. Throws ApiError. */
async function userOf(token: string, env: Env): Promise<string> {
  try {
    const { payload } = await jwtVerify(token, keyFor(env), {
      issuer: `${env.SUPABASE_URL}/auth/v1`,
      audience: "authenticated",
      algorithms: env.SUPABASE_JWT_SECRET ? ["ES256", "RS256", "HS256"] : ["ES256", "RS256"],
      requiredClaims: ["sub", "exp"],
    });
    if (payload.role === "authenticated" && payload.sub) return payload.sub; // no API key passes for a user
  } catch (error) {
    if (!(error instanceof errors.JOSEError) || NOT_THE_TOKENS_FAULT.includes(error.code)) {
      console.error("the project's public keys cannot be fetched", error);
      throw new ApiError(503, "unavailable", "Signing in cannot be checked at the moment; try again soon.");
    }
  }
  throw new ApiError(401, "unauthorized", "The token is not valid or has expired; sign in again.");
}

/** Each algorithm has its own key: a public key never verifies an HMAC, nor the secret a signature. */
function keyFor(env: Env): JWTVerifyGetKey {
  let keys = keySets.get(env.SUPABASE_URL);
  if (!keys) {
    keys = createRemoteJWKSet(new URL(`${env.SUPABASE_URL}/auth/v1/.well-known/jwks.json`));
    keySets.set(env.SUPABASE_URL, keys);
  }
  const published = keys;
  return (header, token) =>
    header.alg === "HS256" ? new TextEncoder().encode(env.SUPABASE_JWT_SECRET) : published(header, token);
}
