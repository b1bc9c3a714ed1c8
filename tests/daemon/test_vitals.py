"""What is asked when /metrics is scraped: seldom enough, never for long, and no figure rather than an old one."""

from __future__ import annotations

import threading

import anyio
import pytest
from prometheus_client import REGISTRY
from support.database import Database

from daemon import metrics, vitals
from daemon.stores import timed
from daemon.vitals import GpuMemory, Vitals
from storage.base import ConfigurationError, UnavailableError
from storage.postgres import PostgresStore

pytestmark = pytest.mark.anyio

PENDING = ("maskd_queue_tasks", {"kind": "segment_visual", "status": "pending"})
NOBODY = "postgresql://nobody@127.0.0.1:1/nothing"


async def test_the_queue_is_asked_for_at_most_once_in_a_while(database: Database) -> None:
    store = timed(PostgresStore(database.dsn))
    looking = Vitals(store, GpuMemory(), every_seconds=60)
    before = calls("status")
    await looking.look()
    assert calls("status") == before, "the store is not open yet"
    looking.open()
    async with anyio.create_task_group() as scrapes:
        for _ in range(5):
            scrapes.start_soon(looking.look)
    await store.close()
    assert calls("status") == before + 1
    assert REGISTRY.get_sample_value(*PENDING) == 0


async def test_a_database_that_is_away_leaves_no_old_figures(database: Database) -> None:
    store = PostgresStore(database.dsn)
    looking = Vitals(store, GpuMemory(), every_seconds=0)
    looking.open()
    await looking.look()
    assert REGISTRY.get_sample_value(*PENDING) == 0
    await store.close()

    away = timed(PostgresStore(NOBODY, timeout_seconds=2))
    failures = REGISTRY.get_sample_value("maskd_database_failures_total", {"call": "status"}) or 0
    looking = Vitals(away, GpuMemory(), every_seconds=0)
    looking.open()
    await looking.look()
    assert REGISTRY.get_sample_value(*PENDING) is None
    assert REGISTRY.get_sample_value("maskd_database_failures_total", {"call": "status"}) == failures + 1


async def test_a_device_that_hangs_holds_up_no_scrape_and_costs_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "ANSWER_SECONDS", 0.1)
    let_go, asked = threading.Event(), []

    def hang() -> dict[str, int]:
        asked.append(1)
        let_go.wait(60)
        return {"allocated": 1}

    memory = GpuMemory()
    looking = Vitals(PostgresStore(NOBODY), memory, every_seconds=0)
    looking.open()
    await memory.open({"gpu0": lambda: {"allocated": 1}})
    assert memory.known == {"gpu0": {"allocated": 1}}
    await memory.open({"gpu0": hang})
    for _ in range(3):
        with anyio.fail_after(30):
            await looking.look()
    assert asked == [1]
    assert memory.known == {}, "no old figure"
    assert REGISTRY.get_sample_value("maskd_gpu_memory_bytes", {"device": "gpu0", "state": "allocated"}) is None
    let_go.set()


async def test_a_device_that_is_lost_has_no_figures_and_ends_nothing() -> None:
    def lost() -> dict[str, int]:
        raise RuntimeError("CUDA error: unspecified launch failure")

    memory = GpuMemory()
    await memory.open({"gpu0": lost, "gpu1": lambda: {"total": 1}})
    assert memory.known == {"gpu1": {"total": 1}}


def test_a_paused_kind_is_no_unserved_one() -> None:
    kinds = [{"kind": "a", "served": False, "paused": True}, {"kind": "b", "served": False, "paused": False}]
    tasks = [{"kind": kind, "status": "pending", "count": 3, "oldest_seconds": 9} for kind in "ab"]
    metrics.show_queue({"kinds": kinds, "tasks": tasks, "workers": []})
    assert [REGISTRY.get_sample_value("maskd_queue_unserved_tasks", {"kind": kind}) for kind in "ab"] == [0, 3]
    assert [REGISTRY.get_sample_value("maskd_queue_paused", {"kind": kind}) for kind in "ab"] == [1, 0]
    metrics.hide_queue()
    assert REGISTRY.get_sample_value("maskd_queue_paused", {"kind": "a"}) is None


async def test_the_memory_of_a_device_is_told_by_state() -> None:
    memory = GpuMemory()
    looking = Vitals(PostgresStore(NOBODY), memory, every_seconds=0)
    looking.open()
    await memory.open({"gpu7": lambda: {"total": 80, "allocated": 3}})
    await looking.look()
    assert REGISTRY.get_sample_value("maskd_gpu_memory_bytes", {"device": "gpu7", "state": "total"}) == 80
    assert REGISTRY.get_sample_value("maskd_gpu_memory_bytes", {"device": "gpu7", "state": "allocated"}) == 3


async def test_a_call_that_fails_is_timed_and_counted_and_fails_still() -> None:
    store = timed(PostgresStore(NOBODY, timeout_seconds=2))
    before = calls("probe")
    with pytest.raises((UnavailableError, ConfigurationError)):
        await store.probe()
    assert calls("probe") == before + 1


def calls(call: str) -> float:
    """How often a function of the queue was called."""
    return REGISTRY.get_sample_value("maskd_database_seconds_count", {"call": call}) or 0


async def test_a_database_that_refuses_to_tell_fails_no_scrape(database: Database) -> None:
    connection = await database.connect()
    await connection.execute("alter table maskd.workers rename column info to information")
    await connection.close()
    store = PostgresStore(database.dsn)
    looking = Vitals(store, GpuMemory(), every_seconds=0)
    looking.open()
    await looking.look()
    await store.close()
    assert REGISTRY.get_sample_value(*PENDING) is None
