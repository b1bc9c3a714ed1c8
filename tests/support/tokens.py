"""Keys of a Supabase project, and users' tokens as its Auth service signs them today (ES256) and did before (HS256)."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

SERVICE_KEY = "sb_secret_of-this-test_0123456789"
PUBLISHABLE_KEY = "sb_publishable_of-this-test"
JWT_SECRET = b"the-secret-of-this-test-signs-tokens"
KEY_ID = "key-of-this-test"
CURVE = ec.SECP256R1()


def token(secret: bytes = JWT_SECRET, **claims: Any) -> str:
    """A token signed with the project's secret, as its legacy keys and its users' older tokens are; or with another."""
    text = _text({"alg": "HS256", "typ": "JWT"}, claims)
    return f"{text}.{_base64(_hmac(text, secret))}"


class Signer:
    """Whoever signs users' tokens with a key pair: the project's Auth service, or a forger with a pair of his own."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(CURVE)

    def token(self, user: str, issuer: str, lives_seconds: int = 3600, **claims: Any) -> str:
        """A token of a user who has signed in; `claims` replace what it says, None takes away."""
        now = int(time.time())
        said: dict[str, Any] = {"iss": f"{issuer}/auth/v1", "aud": "authenticated", "role": "authenticated", "sub": user}
        times = {"iat": now - 10, "exp": now + lives_seconds}
        said = {name: value for name, value in (said | times | claims).items() if value is not None}
        text = _text({"alg": "ES256", "typ": "JWT", "kid": KEY_ID}, said)
        r, s = decode_dss_signature(self._key.sign(text.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{text}.{_base64(r.to_bytes(32, 'big') + s.to_bytes(32, 'big'))}"

    def jwks(self) -> dict[str, Any]:
        """What /auth/v1/.well-known/jwks.json answers: the public half."""
        public = self._key.public_key().public_numbers()
        place = {name: _base64(value.to_bytes(32, "big")) for name, value in (("x", public.x), ("y", public.y))}
        return {"keys": [{"kty": "EC", "crv": "P-256", "alg": "ES256", "use": "sig", "kid": KEY_ID, **place}]}

    def claims(self, token: str) -> dict[str, Any] | None:
        """What a token says, signed by this key or by the project's secret; None of any other."""
        try:
            text, _, signature = token.rpartition(".")
            algorithm = json.loads(_bytes(text.split(".")[0]))["alg"]
            signed = _bytes(signature)
            if algorithm == "HS256":
                if not hmac.compare_digest(_hmac(text), signed):
                    return None
            elif algorithm == "ES256":
                halves = int.from_bytes(signed[:32], "big"), int.from_bytes(signed[32:], "big")
                self._key.public_key().verify(encode_dss_signature(*halves), text.encode(), ec.ECDSA(hashes.SHA256()))
            else:
                return None
            found: dict[str, Any] = json.loads(_bytes(text.split(".")[1]))
        except (ValueError, LookupError, InvalidSignature):
            return None
        return found


AUTH = Signer()


def unsigned(token: str) -> str:
    """The same claims under `alg: none`, with no signature."""
    return f"{_base64(json.dumps({'alg': 'none', 'typ': 'JWT'}).encode())}.{token.split('.')[1]}."


def _text(head: dict[str, Any], claims: dict[str, Any]) -> str:
    return ".".join(_base64(json.dumps(part).encode()) for part in (head, claims))


def _hmac(text: str, secret: bytes = JWT_SECRET) -> bytes:
    return hmac.new(secret, text.encode(), hashlib.sha256).digest()


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
