"""What reaches R2's wire, and what becomes of its refusals and faults."""

from __future__ import annotations

import io
import socket
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from botocore.awsrequest import AWSResponse
from botocore.retries.standard import ExponentialBackoff
from support.s3 import S3Server, s3_server
from support.s3_faults import FaultProxy, fault_proxy

from storage.base import ConfigurationError, InvalidImageError, MissingBlobError, UnavailableError
from storage.r2 import R2Blobs

SECRET = "secret-that-no-message-may-hold"
KEY_ID = "key-id-that-no-message-may-hold"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def blobs(server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> R2Blobs:
    """A store behind the proxy, of three attempts that follow each other without a pause."""
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    return server.blobs(server.make_bucket(), proxy.endpoint, attempts_max=3, read_seconds=2)


class Raw(io.BytesIO):
    def stream(self) -> Iterator[bytes]:
        yield self.read()


class Wire:
    """A store whose requests are caught right before they would leave, and answered as `answers` said last."""

    def __init__(self) -> None:
        self.blobs = R2Blobs("https://account.r2.cloudflarestorage.com", KEY_ID, SECRET, "bucket", attempts_max=1)
        self.blobs._client.meta.events.register("before-send.s3", self._send)
        self.answers(200, b"")

    def answers(self, status: int, body: bytes, *, length: bool = True) -> None:
        self.requests: list[Any] = []
        self._reply = (status, body, {"Content-Length": str(len(body))} if length else {})

    def _send(self, request: Any, **_: Any) -> AWSResponse:
        self.requests.append(request)
        status, body, length = self._reply
        return AWSResponse(request.url, status, {"Content-Type": "application/xml", **length}, Raw(body))


@pytest.fixture(scope="module")
def shared_wire() -> Wire:
    return Wire()


@pytest.fixture
def wire(shared_wire: Wire) -> Wire:
    """The wire, answering 200 with nothing."""
    shared_wire.answers(200, b"")
    return shared_wire


def header(request: Any, name: str) -> str:
    value = request.headers.get(name, "")
    return value.decode() if isinstance(value, bytes) else str(value)


def error_body(code: str) -> bytes:
    return f"<Error><Code>{code}</Code><Message>about {KEY_ID}</Message></Error>".encode()


def everything_said(caught: pytest.ExceptionInfo[BaseException]) -> str:
    return "".join(traceback.format_exception(caught.value)) + str(caught.value) + repr(caught.value)


def test_a_put_sends_its_length_and_neither_chunks_nor_trailers(wire: Wire) -> None:
    wire.blobs.put("masks/a b.png", b"12345", "image/png")
    (request,) = wire.requests
    sent = {name.lower(): header(request, name) for name in request.headers}
    assert request.url == "https://account.r2.cloudflarestorage.com/bucket/masks/a%20b.png"
    assert sent["content-length"] == "5"
    assert sent["x-amz-content-sha256"] != "STREAMING-UNSIGNED-PAYLOAD-TRAILER"
    assert not {"transfer-encoding", "x-amz-trailer", "x-amz-sdk-checksum-algorithm"} & set(sent)
    assert "aws-chunked" not in sent.get("content-encoding", "")
    assert request.body.read() == b"12345"


def test_a_put_names_its_type_and_may_be_cached_for_a_year(wire: Wire) -> None:
    wire.blobs.put("a", b"x", "image/png")
    assert header(wire.requests[0], "Content-Type") == "image/png"
    assert header(wire.requests[0], "Cache-Control") == "public, max-age=31536000, immutable"


def test_requests_are_signed_with_v4_for_the_region_auto_and_never_in_the_url(wire: Wire) -> None:
    wire.answers(200, b"<ListBucketResult/>")
    wire.blobs.probe()
    assert f"Credential={KEY_ID}/" in header(wire.requests[0], "Authorization")
    assert "/auto/s3/aws4_request" in header(wire.requests[0], "Authorization")
    assert "Signature" not in wire.requests[0].url
    assert SECRET not in str(dict(wire.requests[0].headers))


def test_a_get_asks_for_no_checksum(wire: Wire) -> None:
    wire.answers(200, b"data")
    assert wire.blobs.get("a", 10) == b"data"
    assert header(wire.requests[0], "x-amz-checksum-mode") == ""


def test_a_delete_of_many_carries_the_md5_that_every_service_takes(wire: Wire) -> None:
    wire.answers(200, b"<DeleteResult/>")
    wire.blobs.delete(["a", "b"])
    (request,) = wire.requests
    assert len(header(request, "Content-MD5")) == 24
    assert not [name for name in request.headers if "checksum" in name.lower()]


def test_deletes_go_in_groups_of_a_thousand(wire: Wire) -> None:
    wire.answers(200, b"<DeleteResult/>")
    wire.blobs.delete([f"k{number}" for number in range(2001)])
    assert [request.body.count(b"<Key>") for request in wire.requests] == [1000, 1000, 1]


@pytest.mark.parametrize(("code", "kind"), [("AccessDenied", ConfigurationError), ("InternalError", UnavailableError)])
def test_keys_that_a_delete_leaves_are_an_error(wire: Wire, code: str, kind: type[Exception]) -> None:
    wire.answers(200, f"<DeleteResult><Error><Key>a</Key><Code>{code}</Code></Error></DeleteResult>".encode())
    with pytest.raises(kind):
        wire.blobs.delete(["a"])


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (401, "Unauthorized"),
        (403, "AccessDenied"),
        (403, "InvalidAccessKeyId"),
        (403, "SignatureDoesNotMatch"),
        (403, "RequestTimeTooSkewed"),
        (404, "NoSuchBucket"),
        (400, "InvalidArgument"),
        (400, "InvalidBucketName"),
    ],
)
def test_refusals_are_a_matter_of_configuration(wire: Wire, status: int, code: str) -> None:
    wire.answers(status, error_body(code))
    for call in (
        wire.blobs.probe,
        lambda: wire.blobs.get("a", 9),
        lambda: wire.blobs.put("a", b"", "x"),
        lambda: wire.blobs.delete(["a"]),
    ):
        with pytest.raises(ConfigurationError):
            call()


@pytest.mark.parametrize(
    ("status", "code"),
    [
        (429, "TooManyRequests"),
        (500, "InternalError"),
        (502, ""),
        (503, "SlowDown"),
        (503, "ServiceUnavailable"),
        (504, ""),
        (520, ""),
        (400, "RequestTimeout"),
    ],
)
def test_faults_of_the_service_are_unavailable(wire: Wire, status: int, code: str) -> None:
    wire.answers(status, error_body(code) if code else b"<html>Bad gateway</html>")
    for call in (
        wire.blobs.probe,
        lambda: wire.blobs.get("a", 9),
        lambda: wire.blobs.put("a", b"", "x"),
        lambda: wire.blobs.delete(["a"]),
    ):
        with pytest.raises(UnavailableError):
            call()


def test_a_missing_key_is_missing(wire: Wire) -> None:
    wire.answers(404, error_body("NoSuchKey"))
    with pytest.raises(MissingBlobError):
        wire.blobs.get("a", 10)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 429, 503])
def test_no_error_holds_a_credential_or_a_signature(wire: Wire, status: int) -> None:
    wire.answers(status, error_body("Anything").replace(KEY_ID.encode(), b"it"))
    for call in (wire.blobs.probe, lambda: wire.blobs.put("a", b"", "x")):
        with pytest.raises((ConfigurationError, UnavailableError)) as caught:
            call()
        said = everything_said(caught)
        assert SECRET not in said
        assert KEY_ID not in said
        assert "Signature=" not in said


def test_our_own_message_does_not_repeat_what_the_service_says(wire: Wire) -> None:
    wire.answers(403, error_body("InvalidAccessKeyId"))
    with pytest.raises(ConfigurationError) as caught:
        wire.blobs.probe()
    assert KEY_ID not in str(caught.value)


def test_a_bucket_name_that_cannot_be_is_a_matter_of_configuration() -> None:
    with pytest.raises(ConfigurationError, match="R2_BUCKET"):
        R2Blobs("https://example.invalid", KEY_ID, SECRET, "not a bucket!").probe()


@pytest.mark.parametrize("endpoint", ["", "not a url", "account.r2.cloudflarestorage.com"])
def test_an_endpoint_that_is_no_url_is_a_matter_of_configuration(endpoint: str) -> None:
    with pytest.raises(ConfigurationError, match="R2_ENDPOINT"):
        R2Blobs(endpoint, KEY_ID, SECRET, "bucket")


@pytest.mark.parametrize("pair", [("", SECRET), (KEY_ID, "")])
def test_empty_credentials_are_refused_before_others_are_looked_for(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigurationError, match="must both be set"):
        R2Blobs("https://example.invalid", *pair, "bucket")


def test_a_wrong_bucket_is_a_matter_of_configuration_that_names_it(server: S3Server) -> None:
    blobs = server.blobs("no-such-bucket")
    for call in (blobs.probe, lambda: blobs.get("a", 10), lambda: blobs.put("a", b"x", "x"), lambda: blobs.list("", 1)):
        with pytest.raises(ConfigurationError, match="no-such-bucket"):
            call()


def test_a_stored_blob_has_its_headers(server: S3Server, blobs: R2Blobs) -> None:
    blobs.put("a.png", b"x", "image/png")
    reply = server.client.head_object(Bucket=blobs._bucket, Key="a.png")
    assert (reply["ContentType"], reply["CacheControl"]) == ("image/png", "public, max-age=31536000, immutable")


CALLS: dict[str, Callable[[R2Blobs], object]] = {
    "get": lambda blobs: blobs.get("a", 10),
    "put": lambda blobs: blobs.put("a", b"x", "text/plain"),
    "delete": lambda blobs: blobs.delete(["a"]),
    "list": lambda blobs: blobs.list("", 10),
    "probe": lambda blobs: blobs.probe(),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("status", [429, 503])
def test_an_outage_is_unavailable_after_all_attempts(
    blobs: R2Blobs, proxy: FaultProxy, call: Callable[[R2Blobs], object], status: int
) -> None:
    proxy.answer(status)
    with pytest.raises(UnavailableError, match=str(status)):
        call(blobs)
    assert proxy.requests() == 3


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
@pytest.mark.parametrize("status", [429, 503])
def test_two_faults_are_healed_by_the_third_attempt(
    blobs: R2Blobs, proxy: FaultProxy, call: Callable[[R2Blobs], object], status: int
) -> None:
    blobs.put("a", b"x", "text/plain")
    proxy.answer(status, times=2)
    call(blobs)
    assert proxy.requests() == 4


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
def test_a_reset_connection_is_tried_again_and_then_unavailable(
    blobs: R2Blobs, proxy: FaultProxy, call: Callable[[R2Blobs], object]
) -> None:
    blobs.put("a", b"x", "text/plain")
    proxy.reset(times=2)
    call(blobs)
    proxy.reset()
    with pytest.raises(UnavailableError):
        call(blobs)


def test_a_body_that_breaks_off_is_fetched_again(blobs: R2Blobs, proxy: FaultProxy) -> None:
    blobs.put("a", b"x" * 100_000, "text/plain")
    proxy.truncate(times=2)
    assert blobs.get("a", 100_000) == b"x" * 100_000
    assert proxy.requests("GET") == 3


def test_a_body_that_always_breaks_off_is_unavailable_after_three(blobs: R2Blobs, proxy: FaultProxy) -> None:
    blobs.put("a", b"x" * 100_000, "text/plain")
    proxy.truncate()
    with pytest.raises(UnavailableError, match="broke off its answer 3 times"):
        blobs.get("a", 100_000)
    assert proxy.requests("GET") == 3


def test_long_listings_and_deletes_go_page_by_page(blobs: R2Blobs, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.r2._KEYS_A_LIST", 10)
    monkeypatch.setattr("storage.r2._KEYS_A_DELETE", 10)
    keys = [f"many/{number:02}" for number in range(25)]
    for key in keys:
        blobs.put(key, b"", "text/plain")
    assert blobs.list("many/", 100) == keys
    assert blobs.list("many/", 20) == keys[:20]
    assert proxy.requests("GET") == 3 + 2
    blobs.delete(keys)
    assert proxy.requests("POST") == 3
    assert blobs.list("", 1) == []


def test_a_blob_over_the_limit_is_refused_without_asking_again(blobs: R2Blobs, proxy: FaultProxy) -> None:
    blobs.put("a", b"x" * 100_000, "text/plain")
    with pytest.raises(InvalidImageError, match="at most 99,999 bytes"):
        blobs.get("a", 99_999)
    assert proxy.requests("GET") == 1


def test_a_body_without_a_length_is_read_no_further_than_the_limit(wire: Wire) -> None:
    wire.answers(200, b"x" * 100, length=False)
    with pytest.raises(InvalidImageError, match="The file has 51 bytes"):
        wire.blobs.get("a", 50)
    assert wire.blobs.get("a", 100) == b"x" * 100


def test_a_service_that_never_answers_is_unavailable(server: S3Server, proxy: FaultProxy) -> None:
    blobs = server.blobs("bucket", proxy.endpoint, attempts_max=1, read_seconds=0.2)
    proxy.delay(60)
    with pytest.raises(UnavailableError, match="ReadTimeoutError"):
        blobs.probe()


def test_a_service_that_is_not_there_is_unavailable(server: S3Server) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound and not listening: connections are refused
        blobs = server.blobs("bucket", f"http://127.0.0.1:{taken.getsockname()[1]}", attempts_max=1)
        with pytest.raises(UnavailableError, match="EndpointConnectionError"):
            blobs.probe()


def test_the_proxy_can_fault_one_method_and_leave_the_others(blobs: R2Blobs, proxy: FaultProxy) -> None:
    blobs.put("a", b"x", "text/plain")
    proxy.answer(503, method="PUT")
    with pytest.raises(UnavailableError):
        blobs.put("b", b"x", "text/plain")
    assert blobs.get("a", 10) == b"x"
    proxy.clear()
    blobs.put("b", b"x", "text/plain")


def test_every_request_is_told_by_operation_and_status_retries_included(
    server: S3Server, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExponentialBackoff, "delay_amount", lambda *_: 0)
    told: list[tuple[str, int]] = []
    blobs = server.blobs(
        server.make_bucket(), proxy.endpoint, attempts_max=3, answered=lambda operation, code: told.append((operation, code))
    )
    proxy.answer(503, times=2)
    blobs.put("a", b"1", "text/plain")
    proxy.reset(times=1)
    blobs.get("a", 10)
    with pytest.raises(MissingBlobError):
        blobs.get("b", 10)
    assert told == [
        *[("PutObject", 503), ("PutObject", 503), ("PutObject", 200)],
        *[("GetObject", 0), ("GetObject", 200)],
        ("GetObject", 404),
    ]
