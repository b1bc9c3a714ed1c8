"""Sessions by real HTTP: what is created, for whom, how long it lives, and what is refused."""

from __future__ import annotations

import asyncio
import io
import time
from typing import Any

import anyio
import httpx
import numpy as np
import pytest
from structlog.testing import capture_logs
from support.checkpoints import engine as mobile_sam
from support.desk import TTL_SECONDS, a_store, counter
from support.pictures import PHOTO, exif_of, flag, jpeg, saved

from daemon.session_routes import Access
from daemon.tickets import ticket
from models.cache import EmbeddingCache
from models.classical import Classical
from models.mock import Mock

pytestmark = pytest.mark.anyio
CAT = PHOTO.read_bytes()
SMALL = saved(flag(), "PNG")
KEY = "a-key-of-twenty-chars"
NOBODY = "00000000-0000-4000-8000-000000000000"


def code_of(answer: httpx.Response) -> tuple[int, str]:
    error = answer.json()["error"]
    assert error["message"]
    assert error["request_id"]
    return answer.status_code, error["code"]


async def test_an_image_becomes_a_session_that_tells_of_itself() -> None:
    async with counter() as desk:
        created = (await desk.upload(CAT)).json()
        described = (await desk.client.get(f"/session/{created['session_id']}")).json()
    assert (created["width"], created["height"], created["engine"], created["embedding_cached"]) == (451, 300, "mock", False)
    assert created["time_ms"] > 0
    assert described["everything"] == {"status": "none", "progress": 0.0, "count": None}
    assert created["expires_at"].endswith("Z")


@pytest.mark.parametrize(
    ("data", "status", "code"),
    [
        (b"not an image at all", 415, "image_invalid"),
        (b"", 415, "image_invalid"),
        (CAT[: len(CAT) // 2], 415, "image_invalid"),
        (b"GIF89a" + bytes(50), 415, "image_invalid"),
        (jpeg(60000, 60000), 413, "image_too_large"),
    ],
    ids=["text", "empty", "cut short", "another format", "too many pixels"],
)
async def test_what_is_no_good_image_is_refused_and_leaves_nothing(data: bytes, status: int, code: str) -> None:
    async with counter() as desk:
        assert code_of(await desk.upload(data)) == (status, code)
        assert await desk.sessions.store.count() == (0, 0)


async def test_a_file_that_is_too_large_is_refused_before_it_has_all_arrived() -> None:
    async with counter(bytes_max=1_000_000) as desk:
        reader, writer = await asyncio.open_connection("127.0.0.1", desk.server.port)
        head = "POST /session HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        writer.write(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        field = b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        for chunk in [field, *[bytes(1 << 16)] * 17]:
            writer.write(f"{len(chunk):x}\r\n".encode() + chunk + b"\r\n")
            await writer.drain()
        status = await asyncio.wait_for(reader.readline(), 10)  # answered though the body has no end yet
        writer.close()
        declared = await desk.upload(bytes(3_000_000))
    assert b" 413 " in status
    assert code_of(declared) == (413, "image_too_large")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        ({"content": b"{}", "headers": {"Content-Type": "text/plain"}}, 400),
        ({"content": b"nothing", "headers": {"Content-Type": "multipart/form-data; boundary=b"}}, 400),
        ({"content": b"nothing", "headers": {"Content-Type": "multipart/form-data"}}, 400),
        ({"files": {"image": ("a.png", SMALL)}}, 400),
        ({"json": {"project_id": "x", "image_url": "a"}}, 400),
        ({"json": {"project": "x"}}, 400),
        ({"json": []}, 400),
        ({"content": b" " * 1_000_001, "headers": {"Content-Type": "application/json"}}, 413),
    ],
)
async def test_a_request_that_brings_no_file_says_what_to_send(request_: dict[str, Any], status: int) -> None:
    async with counter() as desk:
        answer = await desk.client.post("/session", **request_)
    assert answer.status_code == status, answer.text
    assert answer.json()["error"]["message"]


class Broken(Mock):
    """An engine whose network fails."""

    def embed(self, smalls: Any) -> Any:
        raise RuntimeError("inner workings")


async def test_a_model_that_fails_is_a_500_a_line_in_the_log_and_no_session() -> None:
    with capture_logs() as lines:
        async with counter(Broken()) as desk:
            answer = await desk.upload(SMALL)
            assert await desk.sessions.store.count() == (0, 0)
    assert code_of(answer) == (500, "internal")
    assert "inner workings" not in answer.text
    (failed,) = [line for line in lines if line["event"] == "server.failed"]
    assert failed["request_id"] == answer.json()["error"]["request_id"]


async def test_ten_idle_minutes_end_a_session_and_every_use_prolongs_it() -> None:
    now = [0.0]
    async with counter(store=a_store(lambda: now[0])) as desk:
        session_id = await desk.session(SMALL)
        for _ in range(3):
            now[0] += TTL_SECONDS - 1
            assert (await desk.click(session_id, points=[[3, 3]])).status_code == 200
        now[0] += TTL_SECONDS
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/embedding"), ("GET", "/masks"), ("GET", "/mask?x=1&y=1")):
            assert code_of(await desk.client.request(method, f"/session/{session_id}{path}")) == (404, "session_unknown")
        assert code_of(await desk.click(session_id, points=[[3, 3]])) == (404, "session_unknown")
        assert code_of(await desk.client.post(f"/session/{session_id}/everything")) == (404, "session_unknown")
        assert await desk.sessions.store.count() == (0, 0)


@pytest.mark.parametrize("session_id", [NOBODY, "x", "..%2f..", "%00", NOBODY.upper(), "é"])
async def test_an_unknown_session_is_404(session_id: str) -> None:
    async with counter() as desk:
        assert code_of(await desk.client.get(f"/session/{session_id}")) == (404, "session_unknown")


async def test_a_session_that_is_deleted_is_gone_with_its_embedding() -> None:
    async with counter() as desk:
        session_id = await desk.session(SMALL)
        await desk.session(CAT)
        assert (await desk.client.delete(f"/session/{session_id}")).status_code == 204
        assert code_of(await desk.client.get(f"/session/{session_id}")) == (404, "session_unknown")
        assert desk.cache.entries == 1
        assert (await desk.client.delete("/session")).json() == {"deleted": 1}


async def test_before_the_models_are_loaded_sessions_are_starting() -> None:
    async with counter(started=False) as desk:
        answer = await desk.upload(SMALL)
    assert code_of(answer) == (503, "starting")
    assert answer.headers["Retry-After"] == "1"


class TestAccess:
    """Who may create sessions, from where."""

    @pytest.mark.parametrize(
        ("headers", "status"),
        [
            ({}, 401),
            ({"X-API-Key": "wrong"}, 401),
            ({"X-API-Key": KEY}, 200),
            ({"X-Ticket": ticket(KEY, 1_000_600)}, 200),
            ({"X-Ticket": ticket(KEY, 1_003_600)}, 200),
            ({"X-Ticket": ticket(KEY, 1_003_601)}, 401),
            ({"X-Ticket": ticket(KEY, 1_000_000)}, 401),
            ({"X-Ticket": ticket("another key", 1_000_600)}, 401),
            ({"X-Ticket": ticket(KEY, 1_000_600)[:-1]}, 401),
            ({"X-Ticket": ticket(KEY, 1_000_600).replace("1000600", "1000601")}, 401),
            ({"X-Ticket": "1000600." + "é" * 64}, 401),
            ({"X-Ticket": "٣." + "0" * 64}, 401),
            ({"X-Ticket": "9" * 90 + ".0"}, 401),
        ],
    )
    async def test_creating_takes_the_key_or_a_ticket_that_is_not_over(self, headers: dict[str, str], status: int) -> None:
        encoded = {name: value.encode() for name, value in headers.items()}
        async with counter(access=Access(KEY, clock=lambda: 1_000_000.0)) as desk:
            answer = await desk.client.post("/session", files={"file": SMALL}, headers=encoded)
        assert answer.status_code == status, answer.text

    async def test_what_follows_needs_the_id_only_but_deleting_all_the_key(self) -> None:
        async with counter(access=Access(KEY)) as desk:
            session_id = (await desk.upload(SMALL, **{"X-API-Key": KEY})).json()["session_id"]
            assert (await desk.click(session_id, points=[[3, 3]])).status_code == 200
            for headers in ({}, {"X-Ticket": ticket(KEY, int(time.time()) + 60)}):
                assert code_of(await desk.client.delete("/session", headers=headers)) == (401, "unauthorized")
            assert (await desk.client.delete("/session", headers={"X-API-Key": KEY})).json() == {"deleted": 1}

    @pytest.mark.parametrize(
        "headers",
        [{"Host": "rebound.example"}, {"X-Forwarded-For": "192.0.2.1"}, {"Origin": "https://page.example"}, {"Origin": "null"}],
    )
    async def test_without_a_key_strangers_are_refused(self, headers: dict[str, str]) -> None:
        async with counter() as desk:
            assert code_of(await desk.upload(SMALL, **headers)) == (403, "forbidden")

    async def test_pages_of_allowed_origins_may_ask_and_read_errors_too(self) -> None:
        allowed, other = "https://app.example", "https://other.example"
        preflight = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "x-ticket"}
        async with counter(access=Access(None, frozenset({allowed}))) as desk:
            asked = await desk.client.options("/session", headers={"Origin": allowed, **preflight})
            refused = await desk.client.options("/session", headers={"Origin": other, **preflight})
            created = await desk.upload(SMALL, Origin=allowed)
            failed = await desk.client.get(f"/session/{NOBODY}", headers={"Origin": allowed})
        assert (asked.status_code, asked.headers["Access-Control-Allow-Origin"]) == (204, allowed)
        assert "X-Ticket" in asked.headers["Access-Control-Allow-Headers"]
        assert refused.status_code == 403
        assert "Access-Control-Allow-Origin" not in refused.headers
        assert created.headers["Access-Control-Allow-Origin"] == failed.headers["Access-Control-Allow-Origin"] == allowed
        assert created.headers["Vary"] == "Origin"

    async def test_the_page_is_there_only_where_it_is_wanted(self) -> None:
        async with counter() as desk:
            for path in ("/", "/page/index.html", "/page/..%2fserver.py"):
                assert code_of(await desk.client.get(path)) == (404, "not_found")
        async with counter(with_page=True) as desk:
            assert code_of(await desk.client.get("/page/..%2fserver.py")) == (404, "not_found")


class TestBounds:
    """How much lives and waits, and what embeddings stay."""

    async def test_a_full_store_says_when_to_try_again(self) -> None:
        now = [0.0]
        async with counter(store=a_store(lambda: now[0], sessions_max=1)) as desk:
            session_id = await desk.session(SMALL)
            now[0] = 100.0
            full = await desk.upload(CAT)
            assert (*code_of(full), full.headers["Retry-After"]) == (429, "sessions_full", str(int(TTL_SECONDS) - 100))
            assert desk.cache.misses == 1, "nothing is embedded for want of room"
            await desk.client.delete(f"/session/{session_id}")
            assert (await desk.upload(CAT)).status_code == 200

    async def test_sources_fill_a_bound_in_bytes(self) -> None:
        async with counter(store=a_store(bytes_max=1000)) as desk:
            assert code_of(await desk.upload(CAT)) == (429, "sessions_full")
            assert (await desk.upload(SMALL)).status_code == 200

    async def test_the_same_image_twice_is_embedded_once_also_at_the_same_time(self) -> None:
        async with counter() as desk:
            replies: list[httpx.Response] = []

            async def upload() -> None:
                replies.append(await desk.upload(CAT))

            async with anyio.create_task_group() as tasks:
                for _ in range(3):
                    tasks.start_soon(upload)
            assert desk.cache.misses == 1
            assert len({reply.json()["session_id"] for reply in replies}) == 3
            assert sorted(reply.json()["embedding_cached"] for reply in replies) == [False, True, True]

    async def test_an_embedding_that_was_evicted_is_computed_again_and_answers_the_same(self) -> None:
        model = mobile_sam()
        photo = saved(flag(1400, 1100), "PNG")
        async with counter(model, cache=EmbeddingCache(20_000_000)) as desk:
            session_id = await desk.session(photo)
            before = await desk.click(session_id, points=[[300, 200]])
            desk.cache.discard(next(iter(desk.cache._entries))[2])
            after = await desk.click(session_id, points=[[300, 200]])
            again = await desk.click(session_id, points=[[300, 200]])
        assert [reply.json()["embedding_cached"] for reply in (before, after, again)] == [True, False, True]
        assert before.json()["masks"] == after.json()["masks"]

    async def test_the_embedding_comes_as_a_file_of_float32_where_it_is_one_array(self) -> None:
        model = mobile_sam()
        async with counter(model) as desk:
            session_id = await desk.session(CAT)
            answer = await desk.client.get(f"/session/{session_id}/embedding")
            kept = next(iter(desk.cache._entries.values())).embedding.data
        values = np.load(io.BytesIO(answer.content), allow_pickle=False)
        assert answer.headers["Content-Type"] == "application/octet-stream"
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, kept)
        async with counter(Classical()) as desk:
            session_id = await desk.session(SMALL)
            assert code_of(await desk.client.get(f"/session/{session_id}/embedding")) == (409, "embedding_unavailable")


async def test_a_photo_on_its_side_is_clicked_as_it_is_seen() -> None:
    upright = flag(1301, 833)
    turned = saved(upright.rotate(90, expand=True), "JPEG", exif=exif_of(6), quality=95)
    async with counter(Classical()) as desk:
        created = (await desk.upload(turned)).json()
        (mask,) = await desk.masks(created["session_id"], points=[[100, 100]])
    assert (created["width"], created["height"]) == upright.size
    x0, y0, x1, y1 = mask["box"]
    assert abs(x1 - 650) <= 8
    assert abs(y1 - 416) <= 8
    assert (x0, y0) == (0, 0)
    assert mask["rle"]["size"] == [833, 1301]
