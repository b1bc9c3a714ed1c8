"""Everything mode in a store whose calls take their time, as over a network: one run, whoever asks at once, and an end."""

from __future__ import annotations

import json
import threading
from typing import Any

import anyio
import anyio.lowlevel
import anyio.to_thread
import pytest
from structlog.testing import capture_logs
from support.desk import TTL_SECONDS, Counter, counter
from support.pictures import flag, saved

from models.mock import Mock
from storage.base import UnavailableError
from storage.memory import MemorySessions

pytestmark = pytest.mark.anyio
SMALL = saved(flag(), "PNG")


class Suspending(MemorySessions):
    """Each call lets others go first, several times."""

    async def read(self, session_id: str, part: str) -> bytes | None:
        await self._pause()
        return await super().read(session_id, part)

    async def write(self, session_id: str, part: str, data: bytes) -> bool:
        await self._pause()
        return await super().write(session_id, part, data)

    async def _pause(self) -> None:
        for _ in range(20):
            await anyio.lowlevel.checkpoint()


class Held:
    """An engine that looks for everything when it is let go."""

    def __init__(self) -> None:
        self.model = Mock()
        self.calls = 0
        self.go_on = threading.Event()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def everything(self, embedding: Any, options: Any, stop: Any) -> Any:
        self.calls += 1
        self.go_on.wait(20)
        return self.model.everything(embedding, options, stop)


def suspending() -> Suspending:
    return Suspending(TTL_SECONDS, 100, 100_000_000)


async def start_together(desk: Counter, session_ids: list[str], **body: Any) -> list[dict[str, Any]]:
    told: list[dict[str, Any]] = []

    async def start(session_id: str) -> None:
        told.append(await desk.everything.start(session_id, body))

    async with anyio.create_task_group() as tasks:
        for session_id in session_ids:
            tasks.start_soon(start, session_id)
    return told


async def test_who_asks_at_once_gets_one_run_and_the_daemon_lives_on() -> None:
    engine = Held()
    async with counter(engine, suspending()) as desk:
        session_id = await desk.session(SMALL)
        told = await start_together(desk, [session_id] * 5)
        engine.go_on.set()
        assert [state["status"] for state in told] == ["running"] * 5
        assert (await desk.all_masks(session_id))["status"] == "done"
        assert engine.calls == 1
        assert (await start_together(desk, [session_id] * 3))[0]["status"] == "done"
        assert (await desk.all_masks(session_id, points_per_side=1))["status"] == "done", "others are still started"
        assert desk.everything._runs == {}


async def test_a_start_that_comes_to_nothing_leaves_its_place_to_others() -> None:
    engine = Held()
    engine.go_on.set()
    async with counter(engine, suspending()) as desk:
        session_id = await desk.session(SMALL)
        write, calls = desk.sessions.store.write, [0]

        async def fail_once(session_id: str, part: str, data: bytes) -> bool:
            calls[0] += 1
            if calls[0] == 1:
                raise UnavailableError("away")
            return await write(session_id, part, data)

        desk.sessions.store.write = fail_once  # type: ignore[method-assign]
        statuses = []

        async def start() -> None:
            answer = await desk.client.post(f"/session/{session_id}/everything", json={})
            statuses.append(answer.status_code)

        async with anyio.create_task_group() as tasks:
            tasks.start_soon(start)
            tasks.start_soon(start)
        assert sorted(statuses) == [202, 503]
        assert (await desk.all_masks(session_id))["status"] == "done"


async def test_a_store_that_breaks_in_an_unknown_way_ends_the_run_alone() -> None:
    async with counter(Mock(), suspending()) as desk:
        session_id, other = await desk.session(SMALL), await desk.session(SMALL)
        write = desk.sessions.store.write

        async def broken(written: str, part: str, data: bytes) -> bool:
            if written == session_id and b'"running"' not in data:
                raise ValueError("inner workings")
            return await write(written, part, data)

        desk.sessions.store.write = broken  # type: ignore[method-assign]
        with capture_logs() as lines:
            assert (await desk.client.post(f"/session/{session_id}/everything", json={})).status_code == 202
            assert (await desk.all_masks(other))["status"] == "done"
            with anyio.fail_after(20):
                while desk.everything._runs:
                    await anyio.lowlevel.checkpoint()
    assert {line["event"] for line in lines} >= {"session.everything_failed"}
    assert session_id not in repr(lines), "who reads the log cannot use the session"


async def test_when_the_daemon_ends_its_runs_have_failed() -> None:
    engine, store = Held(), suspending()
    async with counter(engine, store) as desk:
        session_id = await desk.session(SMALL)
        await start_together(desk, [session_id])
        with anyio.fail_after(20):
            while engine.calls == 0:
                await anyio.to_thread.run_sync(engine.go_on.wait, 0.01)
        desk.everything._tasks.cancel_scope.cancel()  # type: ignore[union-attr]
        with anyio.fail_after(20):
            while desk.everything._runs:
                await anyio.lowlevel.checkpoint()
        state = json.loads(await store.read(session_id, "everything") or b"")
        engine.go_on.set()
    assert state["status"] == "failed"


@pytest.mark.parametrize("facts", [b"", b"{", b"[]", b"{}", b"\xff", b'{"width": "1", "height": 1, "content_hash": "a"}'])
async def test_facts_that_nobody_here_wrote_are_no_session(facts: bytes) -> None:
    async with counter(Mock()) as desk:
        session_id = await desk.session(SMALL)
        await desk.sessions.store.write(session_id, "facts", facts)
        for path in (f"/session/{session_id}", f"/session/{session_id}/masks"):
            assert (await desk.client.get(path)).status_code == 404
        assert (await desk.click(session_id, points=[[9, 9]])).status_code == 404


@pytest.mark.parametrize("source", [b"", b"no image"])
async def test_a_source_that_nobody_here_wrote_is_no_session(source: bytes) -> None:
    async with counter(Mock()) as desk:
        session_id = await desk.session(SMALL)
        desk.cache.discard((await desk.sessions.facts(session_id)).content_hash)
        await desk.sessions.store.write(session_id, "source", source)
        assert (await desk.click(session_id, points=[[9, 9]])).status_code == 404


@pytest.mark.parametrize(
    "state", [b"{", b"[]", b"{}", b'{"status": "running"}', b'{"status": "running", "until": "x", "asked": 1}']
)
async def test_a_state_that_nobody_here_wrote_is_none(state: bytes) -> None:
    async with counter(Mock()) as desk:
        session_id = await desk.session(SMALL)
        await desk.sessions.store.write(session_id, "everything", state)
        assert (await desk.client.get(f"/session/{session_id}")).json()["everything"]["status"] == "none"
        assert (await desk.all_masks(session_id))["status"] == "done"
