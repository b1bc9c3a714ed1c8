"""Bodies made to cost much more than they weigh: each is refused after a bounded look, in a short sentence."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import anyio
import httpx
import pytest
from structlog.testing import capture_logs
from support.desk import counter
from support.pictures import flag, saved

from daemon import session_routes
from daemon.fetch import params_of
from daemon.session_bodies import PredictBody, prompt_body
from handlers import _params
from handlers._params import COUNTS_MAX, ENTRIES_MAX, VALUES_MAX, Rle, VisualPrompts, read
from handlers.base import Limits, RejectedError
from models.mock import Mock

pytestmark = pytest.mark.anyio
SMALL = saved(flag(), "PNG")
NOBODY = "0b0c6e5e-6f3f-4a52-9a0d-3a5a3a6d7b11"
JSON = {"Content-Type": "application/json"}


def body(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


COSTLY = {
    "objects with an unknown name": body({"points": [{"a": 1}] * 110_000}),
    "scalars": body({"points": [1] * 490_000}),
    "empty objects": body({"points": [{}] * 330_000}),
    "valid points": body({"points": [[1, 1]] * 160_000}),
    "a long name": body({"n" * 960_000: 1}),
    "many names": body({f"n{number}": 1 for number in range(70_000)}),
    "a long point": body({"points": [[1] * 490_000]}),
    "a long box": body({"box": [1] * 490_000}),
    "many wrong points": body({"points": [{}] * ENTRIES_MAX}),
    "run lengths": body({"mask": {"rle": {"size": [1, 1], "counts": [1] * 400_000}}}),
    "wrong run lengths": body({"mask": {"rle": {"size": [1, 1], "counts": ["x"] * COUNTS_MAX}}}),
    "lists in run lengths": body({"mask": {"rle": {"size": [1, 1], "counts": [[]] * COUNTS_MAX}}}),
    "a long form": body({"format": "x" * 900_000}),
}


@pytest.mark.parametrize("name", COSTLY)
async def test_costly_bodies_are_refused_in_a_short_sentence(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = [0]
    unknown = _params._unknown

    def seen(shown: Any, known: list[str]) -> str:
        looked_at[0] += 1
        return unknown(shown, known)

    monkeypatch.setattr(_params, "_unknown", seen)
    assert len(COSTLY[name]) <= session_routes.JSON_BYTES_MAX
    values = params_of(COSTLY[name])
    for shape in (lambda: prompt_body(values, Limits()), lambda: read(VisualPrompts, values)):
        with pytest.raises(RejectedError) as caught:
            shape()
        assert caught.value.code == "params_invalid"
        assert len(caught.value.message) < 400
    assert looked_at[0] <= 2, "one of each shape"


@pytest.mark.parametrize("name", COSTLY)
async def test_over_http_they_are_the_clients_mistake(name: str) -> None:
    async with counter() as desk:
        session_id = await desk.session(SMALL)
        for path in (f"/session/{session_id}/predict", f"/session/{session_id}/everything"):
            answer = await desk.client.post(path, content=COSTLY[name], headers=JSON)
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "params_invalid")
            assert len(answer.json()["error"]["message"]) < 400


def test_all_lists_together_are_bounded_too() -> None:
    objects = [{"points": [[1, 1]] * 100}] * (VALUES_MAX // 300)
    with pytest.raises(RejectedError, match="more than 200000 values"):
        read(VisualPrompts, {"objects": objects})


def test_what_is_wrong_is_told_once_a_list() -> None:
    with pytest.raises(RejectedError) as caught:
        read(PredictBody, {"points": [{"a": 1}, {"b": 1}], "format": "x"})
    assert 'the parameter "a" is not known' in caught.value.message
    assert caught.value.message.endswith("(1 more).")


def test_the_run_lengths_of_a_large_mask_may_be_a_list() -> None:
    counts = [1] * COUNTS_MAX
    assert read(Rle, {"size": [400, 500], "counts": counts}).counts == counts
    with pytest.raises(RejectedError, match=r"at most 200000 are read; send longer run lengths as COCO's compressed string"):
        read(Rle, {"size": [400, 500], "counts": [*counts, 1]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"{", "This is not valid JSON: unexpected end of data."),
        (b"", "This is not valid JSON"),
        (b'{"a":' + b"[" * 5000 + b"]" * 5000 + b"}", "too deep"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too deep"),
        (b"[]", "must be a JSON object"),
    ],
)
def test_what_is_no_json_is_said_to_be_none(text: bytes, words: str) -> None:
    with pytest.raises(RejectedError) as caught:
        params_of(text)
    assert words in caught.value.message


@pytest.mark.parametrize("path", ["predict", "everything"])
async def test_nothing_is_read_for_who_has_no_session(path: str) -> None:
    async with counter() as desk:
        reader, writer = await asyncio.open_connection("127.0.0.1", desk.server.port)
        head = f"POST /session/{NOBODY}/{path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
        writer.write(head.encode())
        status = await asyncio.wait_for(reader.readline(), 10)
        writer.close()
    assert b" 404 " in status


async def test_a_body_that_does_not_come_is_waited_for_so_long_and_by_so_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session_routes, "BODIES_MAX", 1)
    async with counter() as desk:
        session_id = await desk.session(SMALL)
        reader, writer = await asyncio.open_connection("127.0.0.1", desk.server.port)
        head = f"POST /session/{session_id}/predict HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900\r\n\r\n"
        monkeypatch.setattr(session_routes, "BODY_SECONDS_MAX", 1)
        writer.write(head.encode())
        with anyio.fail_after(10):
            while (busy := await desk.click(session_id, points=[[9, 9]])).status_code == 200:
                pass
        status = await asyncio.wait_for(reader.readline(), 10)
        writer.close()
        assert (busy.status_code, busy.json()["error"]["code"]) == (429, "busy")
        assert b" 408 " in status
        assert (await desk.click(session_id, points=[[9, 9]])).status_code == 200


async def upload(content: bytes) -> httpx.Response:
    async with counter() as desk:
        headers = {"Content-Type": "multipart/form-data; boundary=b"}
        return await desk.client.post("/session", content=content, headers=headers)


def field(name: str, data: bytes = b"x", headers: bytes = b"") -> bytes:
    return b'--b\r\nContent-Disposition: form-data; name="%s"\r\n%s\r\n%s\r\n' % (name.encode(), headers, data)


END = b"--b--\r\n"


@pytest.mark.parametrize(
    "content",
    [
        b"--b\r\n\r\n\r\n" * 200_000,
        b"\r\n" * 500_000 + field("file", SMALL) + END,
        b"".join(field(f"f{number}") for number in range(10)) + field("file", SMALL) + END,
        b"".join(field(f"f{number}", bytes(20_000)) for number in range(6)) + field("file", SMALL) + END,
        field("file", SMALL) + field("more", bytes(400_000)) + END,
        b"".join(
            field(f"f{number}", headers=b"X-A: " + b"a" * 8000 + b"\r\n" + b"X-B: " + b"b" * 8000 + b"\r\n")
            for number in range(8)
        )
        + field("file", SMALL)
        + END,
        field("file", SMALL) + field("file", SMALL) + END,
        field("other") + END,
    ],
    ids=["empty parts", "lines before", "fields", "long fields", "long field after", "headers", "two files", "no file"],
)
async def test_what_lies_around_the_file_is_bounded(content: bytes) -> None:
    answer = await upload(content)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "params_invalid")


async def test_a_few_fields_beside_the_file_do_no_harm() -> None:
    answer = await upload(field("one", bytes(30_000)) + field("file", SMALL) + field("two", bytes(30_000)) + END)
    assert answer.status_code == 200, answer.text


async def test_the_log_holds_no_session() -> None:
    class Broken(Mock):
        def segment(self, questions: Any, stop: Any) -> Any:
            raise RuntimeError("inner workings")

        def everything(self, embedding: Any, options: Any, stop: Any) -> Any:
            raise RuntimeError("inner workings")

    with capture_logs() as lines:
        async with counter(Broken()) as desk:
            session_id = await desk.session(SMALL)
            assert (await desk.click(session_id, points=[[9, 9]])).status_code == 500
            assert (await desk.all_masks(session_id))["status"] == "failed"
    assert {line["event"] for line in lines} >= {"server.failed", "session.everything_failed"}
    (failed,) = [line for line in lines if line["event"] == "server.failed"]
    assert failed["path"] == "/session/{id}/predict"
    assert session_id not in repr(lines)
