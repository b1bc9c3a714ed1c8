"""BlobStore on Cloudflare R2, or anything else that speaks S3, through boto3.

Time-outs and retries are boto3's, set here; what it cannot repeat, a body that breaks off, is repeated here. No message
holds a key of the account or a signature: requests are signed in a header, and a refusal is told by its code alone.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, IncompleteReadError, ParamValidationError
from botocore.parsers import ResponseParserError

from storage.base import ConfigurationError, MissingBlobError, UnavailableError
from storage.blobs import key_fault, too_large

_CACHE_CONTROL = "public, max-age=31536000, immutable"
_KEYS_A_DELETE = 1000
_KEYS_A_LIST = 1000
_BODIES_MAX = 3
"""Times that a body is asked for which breaks off under way."""
_BODY_SECONDS_MAX = 120.0
_CHUNK_BYTES = 1 << 18

_BROKEN_OFF = (HTTPClientError, IncompleteReadError)
_RETRY_CODES = frozenset({"SlowDown", "InternalError", "ServiceUnavailable", "RequestTimeout", "OperationAborted"})
_RETRY_STATUSES = frozenset({408, 409, 425, 429})


class R2Blobs:
    """Blobs in one bucket. Thread-safe; keeps up to `connections_max` connections open, one per calling thread is enough.

    `answered` hears of every request, retries included: the operation, and the HTTP status or 0 when no answer came; on the
    calling thread. Raises ConfigurationError at once when the endpoint is no URL or a credential is empty.
    """

    def __init__(
        self,
        endpoint: str,
        access_key_id: str,
        secret_access_key: str,
        bucket: str,
        *,
        region: str = "auto",
        connect_seconds: float = 5,
        read_seconds: float = 30,
        connections_max: int = 16,
        attempts_max: int = 5,
        answered: Callable[[str, int], None] | None = None,
    ) -> None:
        if not access_key_id or not secret_access_key:  # boto3 would go looking for others, in files and on the network
            raise ConfigurationError("R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY must both be set.")
        self._bucket = bucket
        config = _config(connect_seconds, read_seconds, connections_max, attempts_max)
        session = boto3.session.Session(access_key_id, secret_access_key, region_name=region)
        try:
            self._client: Any = session.client("s3", endpoint_url=endpoint, config=config)
        except (ValueError, BotoCoreError) as error:
            raise ConfigurationError("R2_ENDPOINT is not the URL of an S3 service.") from error
        self._client.meta.events.register("before-call.s3.DeleteObjects", _sum_by_md5)
        if answered is not None:
            self._client.meta.events.register("response-received.s3", _teller(answered))

    def get(self, key: str, bytes_max: int) -> bytes:
        """The blob's bytes.

        Raises MissingBlobError, InvalidImageError("image_too_large"), ConfigurationError, UnavailableError.
        """
        if key_fault(key):
            raise MissingBlobError(key)
        for _ in range(_BODIES_MAX):
            reply = self._call("get_object", key, Key=key)
            with closing(reply["Body"]) as body:
                try:
                    return _drain(body, reply.get("ContentLength"), bytes_max)
                except _BROKEN_OFF as error:
                    broken = error
        raise UnavailableError(f"R2 broke off its answer {_BODIES_MAX} times ({type(broken).__name__}).") from broken

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store `data` with that content type and a cache header of a year. Raises ValueError for a key that points
        elsewhere, ConfigurationError, UnavailableError."""
        if fault := key_fault(key):
            raise ValueError(fault)
        self._call("put_object", Key=key, Body=data, ContentType=content_type, CacheControl=_CACHE_CONTROL)

    def delete(self, keys: Sequence[str]) -> None:
        """Delete in groups of 1000. Raises ConfigurationError, UnavailableError (some may be deleted by then; repeat all)."""
        wanted = [key for key in keys if not key_fault(key)]
        for start in range(0, len(wanted), _KEYS_A_DELETE):
            group = [{"Key": key} for key in wanted[start : start + _KEYS_A_DELETE]]
            reply = self._call("delete_objects", Delete={"Objects": group, "Quiet": True})
            _check_deleted(reply.get("Errors", []), self._bucket)

    def list(self, prefix: str, limit: int) -> list[str]:
        """At most `limit` keys that begin with `prefix`, in the order of their UTF-8 bytes. Raises ConfigurationError,
        UnavailableError."""
        keys: list[str] = []
        for page in self._pages(prefix, limit):
            keys += page
            if len(keys) >= limit:
                break
        return keys[: max(limit, 0)]

    def probe(self) -> None:
        """List one key: proves the address, the credentials and the bucket. Raises ConfigurationError, UnavailableError."""
        self._call("list_objects_v2", MaxKeys=1)

    def describe(self) -> str:
        """Bucket, host, and when checksums are sent: R2 takes only what is `when_required`."""
        meta = self._client.meta
        place = f"bucket {self._bucket} at {urlsplit(meta.endpoint_url).netloc}"
        return f"{place}, checksums {meta.config.request_checksum_calculation}"

    def _pages(self, prefix: str, limit: int) -> Iterator[Sequence[str]]:
        asked: dict[str, Any] = {"Prefix": prefix, "MaxKeys": min(limit, _KEYS_A_LIST)}
        while limit > 0:
            reply = self._call("list_objects_v2", **asked)
            yield [entry["Key"] for entry in reply.get("Contents", [])]
            if not reply.get("IsTruncated"):
                return
            asked["ContinuationToken"] = reply["NextContinuationToken"]

    def _call(self, operation: str, /, sought: str | None = None, **arguments: Any) -> Any:
        """One request, with boto3's retries; `sought` is the key whose absence is MissingBlobError."""
        try:
            return getattr(self._client, operation)(Bucket=self._bucket, **arguments)
        except ClientError as error:
            code, status = _answer(error)
            if sought is not None and status == 404 and code != "NoSuchBucket":
                raise MissingBlobError(sought) from error
            raise _refusal(code, status, self._bucket) from error
        except ParamValidationError as error:
            raise ConfigurationError(f"R2 cannot have a bucket {self._bucket!r}: check R2_BUCKET.") from error
        except (BotoCoreError, ResponseParserError) as error:  # no connection, no answer in time, an answer that is not S3's
            raise UnavailableError(f"R2 does not answer {operation} ({type(error).__name__}).") from error


def _config(connect_seconds: float, read_seconds: float, connections_max: int, attempts_max: int) -> Config:
    return Config(
        signature_version="s3v4",
        s3={"addressing_style": "path"},
        # R2 refuses the trailing checksums that boto3 would send of its own accord
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        retries={"mode": "standard", "total_max_attempts": attempts_max},
        connect_timeout=connect_seconds,
        read_timeout=read_seconds,
        max_pool_connections=connections_max,
        tcp_keepalive=True,
    )


def _teller(answered: Callable[[str, int], None]) -> Callable[..., None]:
    def tell(event_name: str, response_dict: dict[str, Any] | None, **_: Any) -> None:
        answered(event_name.rpartition(".")[2], 0 if response_dict is None else int(response_dict["status_code"]))

    return tell


def _sum_by_md5(params: dict[str, Any], **_: Any) -> None:
    """Give DeleteObjects the Content-MD5 that every S3 service takes, instead of boto3's newer CRC32 that some refuse."""
    params["headers"]["Content-MD5"] = base64.b64encode(hashlib.md5(params["body"], usedforsecurity=False).digest()).decode()
    params["headers"].pop("x-amz-sdk-checksum-algorithm", None)
    params["context"].pop("checksum", None)


def _drain(body: Any, length: int | None, bytes_max: int) -> bytes:
    """Read a body that should have `length` bytes, never more than `bytes_max` + 1 of it and never longer than its time."""
    if length is not None and length > bytes_max:
        raise too_large(length, bytes_max)
    ends = time.monotonic() + _BODY_SECONDS_MAX
    data = bytearray()
    while chunk := body.read(min(_CHUNK_BYTES, bytes_max + 1 - len(data))):
        data += chunk
        if len(data) > bytes_max:
            raise too_large(len(data), bytes_max)
        if time.monotonic() > ends:
            raise UnavailableError(f"R2 sent only {len(data)} bytes in {_BODY_SECONDS_MAX:.0f} s.")
    if length is not None and len(data) != length:
        raise IncompleteReadError(actual_bytes=len(data), expected_bytes=length)
    return bytes(data)


def _answer(error: ClientError) -> tuple[str, int]:
    code = str(error.response.get("Error", {}).get("Code", "unknown"))[:64]
    return code, int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))


def _refusal(code: str, status: int, bucket: str) -> UnavailableError | ConfigurationError:
    if status >= 500 or status in _RETRY_STATUSES or code in _RETRY_CODES:
        return UnavailableError(f"R2 answers {status} {code}.")
    if code == "NoSuchBucket":
        return ConfigurationError(f"R2 has no bucket {bucket!r}: check R2_BUCKET and R2_ENDPOINT.")
    if code == "RequestTimeTooSkewed":
        return ConfigurationError("R2 finds the clock of this machine wrong: set the time.")
    if status in (401, 403):
        keys = "R2_ACCESS_KEY_ID, R2_SECRET_ACCESS_KEY and what the token may do with the bucket"
        return ConfigurationError(f"R2 refuses the credentials ({status} {code}): check {keys}.")
    return ConfigurationError(f"R2 refuses the request ({status} {code}): check R2_ENDPOINT, R2_BUCKET and the credentials.")


def _check_deleted(errors: Sequence[dict[str, Any]], bucket: str) -> None:
    """Raise for the keys that DeleteObjects says it left; an absent key is none of them."""
    codes = {str(error.get("Code", "unknown"))[:64] for error in errors} - {"NoSuchKey"}
    if refused := codes & {"AccessDenied", "Unauthorized"}:
        raise _refusal(refused.pop(), 403, bucket)
    if codes:
        raise UnavailableError(f"R2 left {len(errors)} keys undeleted ({', '.join(sorted(codes))}).")
