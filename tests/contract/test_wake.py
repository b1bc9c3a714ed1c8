"""Wake sources: every insert is a hint, a proof is a round trip, and any loss is repaired by itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

import anyio
import pytest
from support.database import Database
from support.postgrest import SERVICE_KEY
from support.realtime_server import supabase
from support.stores import Queue, new_id

from storage.base import WakeSource
from storage.notify import NotifyWake
from storage.realtime import RealtimeWake

pytestmark = pytest.mark.anyio


class Heard:
    """What a source told: hints counted, proof as it stands."""

    def __init__(self) -> None:
        self.hints = 0
        self.states: list[bool] = []
        self._changed = anyio.Event()

    def wake(self) -> None:
        self.hints += 1
        self._change()

    def proven(self, state: bool) -> None:
        self.states.append(state)
        self._change()

    async def until_proven(self) -> None:
        with anyio.fail_after(20):
            while not self.states or not self.states[-1]:
                await self._changed.wait()

    async def until_hints(self, count: int) -> None:
        with anyio.fail_after(20):
            while self.hints < count:
                await self._changed.wait()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()


@pytest.fixture(params=["notify", "realtime"])
def source(request: pytest.FixtureRequest, database: Database) -> Iterator[WakeSource]:
    """A source of each kind on one database."""
    if request.param == "notify":
        yield by_notify(database)
        return
    with supabase(database.dsn) as (server, _realtime):
        yield RealtimeWake(server.url, SERVICE_KEY)


def by_notify(database: Database) -> NotifyWake:
    return NotifyWake(database.dsn, probe_seconds=0.2, timeout_seconds=2)


@asynccontextmanager
async def listening(source: WakeSource) -> AsyncIterator[Heard]:
    heard = Heard()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(source.run, heard.wake, heard.proven)
        await heard.until_proven()
        yield heard
        tasks.cancel_scope.cancel()


async def test_an_insert_is_a_hint(database: Database, source: WakeSource) -> None:
    queue = await Queue.open(database)
    async with listening(source) as heard:
        before = heard.hints
        await queue.insert()
        await heard.until_hints(before + 1)
    await queue.close()


async def test_a_large_insert_is_one_hint(database: Database) -> None:
    queue = await Queue.open(database)
    async with listening(by_notify(database)) as heard:
        before = heard.hints
        await queue.insert(500)
        await heard.until_hints(before + 1)
        assert heard.hints == before + 1
    await queue.close()


async def test_claims_and_settles_are_no_hints(database: Database, source: WakeSource) -> None:
    queue = await Queue.open(database)
    await queue.insert(3)
    async with listening(source) as heard:
        before = heard.hints
        await queue.settle(await queue.claim("00000000-0000-0000-0000-000000000001"))
        await queue.insert()
        await heard.until_hints(before + 1)
        assert heard.hints == before + 1, "the insert alone was heard"
    await queue.close()


async def test_a_task_that_may_go_on_now_is_a_hint(database: Database, source: WakeSource) -> None:
    queue = await Queue.open(database)
    (parent,) = await queue.insert()
    tasks = await queue.claim(new_id())
    await queue.sql.execute(
        """insert into public.segmentation_results (project_id, kind, source_image_url, after)
           select project_id, kind, source_image_url, id from public.segmentation_results where id = $1""",
        parent,
    )
    async with listening(source) as heard:
        before = heard.hints
        await queue.settle(tasks)
        await heard.until_hints(before + 1)
    await queue.close()


async def test_it_knows_how_many_live_workers_hear_the_same_hints(database: Database) -> None:
    queue, listener = await Queue.open(database), by_notify(database)
    for _ in range(7):
        await queue.sql.execute("select maskd.beat($1, 30, '{}', '{}', '{}', '{}', '{}', '{}')", new_id())
    await queue.sql.execute(
        "select maskd.beat($1, 0, '{}', '{}', '{}', '{}', '{}', '{}')", new_id()
    )  # silent for too long already
    async with listening(listener):
        assert listener.workers == 7
    await queue.close()


async def test_a_connection_that_is_cut_is_made_anew_and_a_look_follows(database: Database) -> None:
    sql = await database.connect()
    async with listening(by_notify(database)) as heard:
        before = heard.hints
        await sql.execute(
            """select pg_terminate_backend(pid) from pg_stat_activity
                where application_name = 'maskd listen' and datname = current_database()"""
        )
        await heard.until_hints(before + 1)
        await heard.until_proven()
        assert False in heard.states, "meanwhile push was not proven"
    await sql.close()
