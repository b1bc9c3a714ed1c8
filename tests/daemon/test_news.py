"""What a worker tells of itself, and what /health asks the database."""

from __future__ import annotations

from typing import Any, cast

import httpx
import pytest

from daemon import metrics
from daemon.engines import Station
from daemon.news import MB, PausedKinds, gpu_memory
from daemon.server import Server
from daemon.session_routes import Access
from models.base import Models
from models.cache import EmbeddingCache
from storage.base import RefusedError, TaskStore, UnavailableError

pytestmark = pytest.mark.anyio


class Answers:
    """The one call of a store, answered in turn."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)

    async def ask(self, function: str, **arguments: Any) -> Any:
        assert (function, arguments) == ("paused", {})
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


@pytest.mark.parametrize("error", [UnavailableError("away"), RefusedError("no")])
async def test_while_the_database_does_not_say_nobody_knows_what_is_paused(error: Exception) -> None:
    assert await PausedKinds(cast(TaskStore, Answers(error))).health() == {"paused": None}


async def test_the_database_is_not_asked_again_at_once() -> None:
    kinds = PausedKinds(cast(TaskStore, Answers(["fill_object"])))
    assert [await kinds.health() for _ in range(3)] == [{"paused": ["fill_object"]}] * 3


@pytest.mark.parametrize(("status", "asked"), [("starting", False), ("ok", True), ("degraded", True)])
async def test_health_asks_once_the_worker_has_begun(status: str, asked: bool) -> None:
    kinds = PausedKinds(cast(TaskStore, Answers([])))
    server = Server("127.0.0.1", 0, Access(None), lambda: {"status": status}, more=kinds.health)
    await server.start()
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=10) as client:
        body = (await client.get("/health")).json()
    await server.stop()
    assert body == ({"status": status, "paused": []} if asked else {"status": status})


def test_gpu_memory_is_told_by_device_in_mib_of_what_maskd_may_take() -> None:
    cpu, gpu, silent = (
        Station(*names, Models(EmbeddingCache(0))) for names in (("cpu", "cpu"), ("gpu0", "cuda:0"), ("gpu1", "cuda:1"))
    )
    known = {"gpu0": {"total": 80 * MB, "budget": 16 * MB, "allocated": 2 * MB, "reserved": 3 * MB}}
    assert gpu_memory([gpu, silent, cpu], known) == {"cuda:0": {"used_mb": 3, "total_mb": 16}}


def test_latencies_are_the_median_and_the_95th_percentile_of_the_last_times() -> None:
    metrics.RECENT["fetch"].clear()
    for number in range(100):
        metrics.took("fetch", number / 1000)
    assert metrics.latencies()["fetch"] == {"p50_ms": 50.0, "p95_ms": 95.0}
    for _ in range(10_000):
        metrics.took("fetch", 1.0)
    assert len(metrics.RECENT["fetch"]) == metrics.RECENT_MAX
    metrics.RECENT["fetch"].clear()
    assert "fetch" not in metrics.latencies()
