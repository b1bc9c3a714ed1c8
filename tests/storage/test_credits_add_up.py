"""Whatever happens to tasks, in whatever order: no credit is made and none is lost, and no task is refunded twice."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.database import Database
from support.people import Person, as_user, cancel, create, person
from support.stores import KINDS, new_id

from storage.base import Beat, Fate, Outcome, Task
from storage.postgres import PostgresStore

START = 12
ALL_KINDS = (*KINDS, "fill_object", "convert_image")
NUMBER = st.integers(0, 30)
STEPS = st.one_of(
    st.tuples(st.just("create"), st.sampled_from(ALL_KINDS), st.none() | NUMBER, st.sampled_from([None, "a", "b"])),
    st.tuples(st.just("claim"), st.integers(0, 1), st.integers(1, 4)),
    st.tuples(st.just("settle"), NUMBER, st.sampled_from(list(Fate))),
    st.tuples(st.just("again"), NUMBER),
    st.tuples(st.just("cancel"), NUMBER),
    st.tuples(st.just("delete"), NUMBER),
    st.tuples(st.just("retry")),
    st.tuples(st.just("die"), st.integers(0, 1), st.booleans()),
    st.tuples(st.just("unserved")),
)


@dataclass(slots=True, eq=False)
class World:
    """One user, two workers, and all that was ever claimed and said about it."""

    sql: asyncpg.Connection[Any]
    store: PostgresStore
    who: Person
    workers: list[str] = field(default_factory=lambda: [new_id(), new_id()])
    made: list[str] = field(default_factory=list)
    claimed: list[Task] = field(default_factory=list)
    said: list[Outcome] = field(default_factory=list)

    async def do(self, what: str, *how: Any) -> None:
        await getattr(self, what)(*how)

    async def create(self, kind: str, after: int | None, key: str | None) -> None:
        parent = self.made[after % len(self.made)] if after is not None and self.made else None
        try:
            task = await create(self.sql, self.who, kind, after=parent, idempotency_key=key)
            self.made += [] if task["repeated"] else [task["id"]]
        except asyncpg.PostgresError as error:
            if error.sqlstate not in ("PT400", "PT402", "PT409"):
                raise

    async def claim(self, worker: int, most: int) -> None:
        await self.store.beat(Beat(self.workers[worker], 30.0, {}, ALL_KINDS, [], [], []))
        self.claimed += (await self.store.claim(self.workers[worker], new_id(), ALL_KINDS, most)).tasks

    async def settle(self, which: int, fate: Fate) -> None:
        if self.claimed:
            task = self.claimed[which % len(self.claimed)]
            self.said.append(Outcome(task.id, task.token, fate, code="internal", message="x"))
            await self.store.settle([self.said[-1]])

    async def again(self, which: int) -> None:
        if self.said:
            await self.store.settle([self.said[which % len(self.said)]])

    async def cancel(self, which: int) -> None:
        if self.made:
            await cancel(self.sql, self.who, self.made[which % len(self.made)])

    async def delete(self, which: int) -> None:
        if self.made:
            gone = self.made.pop(which % len(self.made))
            await as_user(self.sql, self.who.id, "delete from public.segmentation_results where id = $1::text::uuid", gone)

    async def retry(self) -> None:
        await self.sql.execute("select maskd.retry(null, null, 100)")

    async def die(self, worker: int, begun: bool) -> None:
        await self.store.bury(self.workers[worker], [task.id for task in self.claimed] if begun else [])
        self.workers[worker] = new_id()

    async def unserved(self) -> None:
        await self.sql.execute("update maskd.kinds set served_at = null; select maskd.end_unserved(-1)")

    async def check(self) -> None:
        left, net = await self.sql.fetchrow(
            """select p.credits, (select coalesce(sum(u.credits_used), 0) from public.usage_logs u where u.user_id = p.id)
                 from public.users_profile p where p.id = $1""",
            self.who.id,
        )
        assert left == START - net >= 0
        rows = await self.sql.fetch(
            """select u.task_id, r.status, r.charged, sum(u.credits_used) as net, max(u.credits_used) as price,
                      count(*) filter (where u.action = 'refund') as refunds
                 from public.usage_logs u left join public.segmentation_results r on r.id = u.task_id
                where u.user_id = $1 group by 1, 2, 3""",
            self.who.id,
        )
        for row in rows:
            assert row["refunds"] <= 1, row
            assert row["net"] in (0, row["price"]), row
            if row["status"] is not None:
                assert row["charged"] == row["net"], row
            if row["status"] == "error":
                assert row["net"] == 0, row


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=st.lists(STEPS, min_size=5, max_size=30))
def test_credits_add_up_and_refunds_happen_once(database: Database, steps: list[tuple[Any, ...]]) -> None:
    async def go() -> None:
        sql = await database.connect()
        store = PostgresStore(database.dsn)
        await store.open()
        try:
            await sql.execute("truncate public.segmentation_results, public.usage_logs, maskd.workers, maskd.tombstones")
            world = World(sql, store, await person(sql, START))
            for step in steps:
                await world.do(*step)
                await world.check()
        finally:
            await store.close()
            await sql.close()

    asyncio.run(go())
