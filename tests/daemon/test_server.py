"""The endpoint by real HTTP: what it tells, to whom, and how it fails."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from daemon import metrics
from daemon.server import Server
from daemon.session_routes import Access
from models.cache import EmbeddingCache
from storage.base import ConfigurationError

pytestmark = pytest.mark.anyio
KEY = "a-key-of-twenty-chars"


@asynccontextmanager
async def serving(
    health: Mapping[str, Any] | Exception, key: str | None = None, host: str = "127.0.0.1"
) -> AsyncIterator[httpx.AsyncClient]:
    def tell() -> dict[str, Any]:
        if isinstance(health, Exception):
            raise health
        return dict(health)

    server = Server(host, 0, Access(key), tell)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=10) as client:
        yield client
    await server.stop()


async def test_health_tells_what_it_was_handed() -> None:
    async with serving({"status": "ok", "wake": "push"}) as client:
        assert (await client.get("/health")).json() == {"status": "ok", "wake": "push"}


@pytest.mark.parametrize(("status", "code"), [("starting", 503), ("degraded", 503), ("ok", 200)])
async def test_ready_is_200_only_when_all_is_well(status: str, code: int) -> None:
    async with serving({"status": status}) as client:
        assert (await client.get("/ready")).status_code == code


async def test_metrics_are_those_of_prometheus() -> None:
    metrics.initialise(["segment_visual"], EmbeddingCache(0))
    async with serving({"status": "ok"}) as client:
        text = (await client.get("/metrics")).text
    assert 'maskd_wake_mode{mode="poll"}' in text
    assert 'maskd_tasks_settled_total{fate="done",kind="segment_visual"}' in text
    assert "maskd_embedding_cache_bytes 0.0" in text


async def test_on_a_public_address_only_the_key_opens_more_than_ok_or_not() -> None:
    async with serving({"status": "ok", "worker": "w"}, KEY, host="0.0.0.0") as client:  # noqa: S104 - on purpose
        assert (await client.get("/health")).json() == {"status": "ok"}
        assert (await client.get("/metrics")).status_code == 401
        wrong = await client.get("/health", headers={"X-API-Key": "wrong"})
        assert wrong.json() == {"status": "ok"}
        right = await client.get("/health", headers={"X-API-Key": KEY})
        assert right.json()["worker"] == "w"
        assert (await client.get("/metrics", headers={"X-API-Key": KEY})).status_code == 200
        assert (await client.get("/metrics", headers={"Authorization": f"Bearer {KEY}"})).status_code == 200
        for other in ("Bearer wrong", f"Basic {KEY}", KEY):
            assert (await client.get("/metrics", headers={"Authorization": other})).status_code == 401


async def test_a_key_that_is_no_utf_8_is_a_wrong_key() -> None:
    async with serving({"status": "ok", "worker": "w"}, KEY) as client:
        answer = await client.get("/health", headers={b"X-API-Key": b"\xff\xfe"})
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost:8000", "LOCALHOST", "[::1]:8000", "[::1]"])
async def test_without_a_key_this_host_is_answered_by_each_of_its_names(host: str) -> None:
    async with serving({"status": "ok", "worker": "w"}) as client:
        assert (await client.get("/health", headers={"Host": host})).json()["worker"] == "w"


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "rebound.example"},
        {"Host": "localhost.example:8000"},
        {"Host": "[::2]:8000"},
        {"X-Forwarded-For": "192.0.2.1"},
        {"Forwarded": "for=192.0.2.1"},
        {"X-Real-IP": "192.0.2.1"},
        {"X-Forwarded-Host": "localhost"},
        {"X-Forwarded-Proto": "https"},
        {"Via": "1.1 proxy"},
        {"CF-Connecting-IP": "192.0.2.1"},
    ],
)
@pytest.mark.parametrize("path", ["/health", "/ready", "/metrics", "/nowhere"])
async def test_without_a_key_tunnels_and_other_names_are_refused(path: str, headers: dict[str, str]) -> None:
    async with serving({"status": "ok", "worker": "w"}) as client:
        answer = await client.get(path, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")


async def test_with_a_key_any_name_will_do_and_metrics_need_none_on_this_host() -> None:
    async with serving({"status": "ok"}, KEY) as client:
        named = await client.get("/health", headers={"Host": "worker.example", "X-Forwarded-For": "192.0.2.1"})
        assert named.status_code == 200
        assert (await client.get("/metrics")).status_code == 200


async def test_a_port_that_is_taken_is_a_mistake_of_configuration() -> None:
    async with serving({"status": "ok"}) as client:
        port = client.base_url.port
        assert port is not None
        with pytest.raises(ConfigurationError, match=f"MASKD_PORT {port} is in use: choose another"):
            await Server("127.0.0.1", port, Access(None), dict).start()


async def test_an_address_of_another_host_is_a_mistake_of_configuration() -> None:
    with pytest.raises(ConfigurationError, match=r"MASKD_HOST 192\.0\.2\.1"):
        await Server("192.0.2.1", 0, Access(KEY), dict).start()


async def test_errors_have_a_code_a_sentence_and_a_request_id_but_no_internals() -> None:
    async with serving(ValueError("inner workings")) as client:
        failed = await client.get("/health")
        missing = await client.get("/nowhere")
    assert failed.status_code == 500
    assert failed.json()["error"]["code"] == "internal"
    assert "inner workings" not in failed.text
    assert missing.json()["error"]["code"] == "not_found"
    assert missing.json()["error"]["request_id"]
