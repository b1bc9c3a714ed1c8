"""The queue in a test: a store of each implementation over one migrated database, and short words for what tests do with it."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
from support.database import Database

from storage.base import Beat, Claimed, Fate, Outcome, Task, TaskStore
from storage.client import Owner, TaskClient
from storage.postgres import PostgresStore

KINDS = ("segment_visual", "segment_everything")


def new_id() -> str:
    return str(uuid.uuid4())


@dataclass(slots=True, eq=False)
class Queue:
    """One database with a store, a client that inserts, and a superuser's connection to look behind the curtain."""

    store: TaskStore
    client: TaskClient
    sql: asyncpg.Connection[Any]
    owner: Owner

    @classmethod
    async def open(cls, database: Database, store: TaskStore | None = None) -> Queue:
        """`store`, not open yet, is the one on asyncpg when none is given."""
        store = PostgresStore(database.dsn) if store is None else store
        await store.open()
        client = await TaskClient.connect(database.dsn)
        return cls(store, client, await database.connect(), await client.owner(None))

    async def close(self) -> None:
        await self.store.close()
        await self.client.close()
        await self.sql.close()

    async def new_owner(self, tier: str | None = None) -> Owner:
        """Another user with a project."""
        user = await self.sql.fetchval("insert into auth.users default values returning id::text")
        if tier is not None:
            await self.sql.execute("insert into public.users_profile (id, tier) values ($1, $2)", user, tier)
        project = await self.sql.fetchval("insert into public.projects (user_id) values ($1) returning id::text", user)
        return Owner(user, project)

    async def insert(self, count: int = 1, owner: Owner | None = None, kind: str = KINDS[0], image: str = "a.jpg") -> list[str]:
        """`count` rows of one image in one statement; their ids."""
        owner = owner or self.owner
        rows = await self.sql.fetch(
            """insert into public.segmentation_results (project_id, kind, source_image_url)
               select $1, $2, $3 from generate_series(1, $4::integer) returning id::text""",
            owner.project_id,
            kind,
            f"uploads/{owner.user_id}/{image}",
            count,
        )
        return [row[0] for row in rows]

    async def claim(
        self, worker: str, most: int = 100, kinds: Sequence[str] = KINDS, token: str | None = None
    ) -> tuple[Task, ...]:
        return (await self.answer(worker, most, kinds, token)).tasks

    async def answer(self, worker: str, most: int = 100, kinds: Sequence[str] = KINDS, token: str | None = None) -> Claimed:
        return await self.store.claim(worker, token or new_id(), kinds, most)

    async def beat(
        self, worker: str, held: Iterable[Task] = (), begun: Iterable[str] = (), open_tokens: Iterable[str] = ()
    ) -> list[tuple[str, str]]:
        pairs = [(task.id, task.token) for task in held]
        return await self.store.beat(Beat(worker, 30.0, {}, KINDS, pairs, list(begun), list(open_tokens)))

    async def steady(self, worker: str) -> None:
        """Make the database believe that `worker` has beaten without a gap for an hour."""
        await self.beat(worker)
        await self.sql.execute("update maskd.workers set steady_since = steady_since - interval '1 hour' where id = $1", worker)

    async def silence(self, worker: str, seconds: float = 3600) -> None:
        """Make the database believe that the last beat of `worker` is long ago."""
        await self.sql.execute(
            "update maskd.workers set beat_at = beat_at - make_interval(secs => $2) where id = $1", worker, float(seconds)
        )

    async def settle(self, tasks: Iterable[Task], fate: Fate = Fate.DONE, **more: Any) -> dict[str, str]:
        verdicts = await self.store.settle([Outcome(task.id, task.token, fate, **more) for task in tasks])
        return {task_id: verdict.value for (task_id, _), verdict in verdicts.items()}

    async def retry(self, ids: Sequence[str] | None, code: str | None, most: int) -> int:
        """Put failed tasks back; how many."""
        return int(await self.sql.fetchval("select maskd.retry($1, $2, $3)", ids, code, most))

    async def row(self, task_id: str) -> asyncpg.Record:
        row = await self.sql.fetchrow("select * from public.segmentation_results where id = $1", task_id)
        assert row is not None
        return row

    async def error(self, task_id: str) -> dict[str, str] | None:
        value = (await self.row(task_id))["error"]
        return None if value is None else json.loads(value)

    async def statuses(self) -> dict[str, int]:
        rows = await self.sql.fetch("select status, count(*) from public.segmentation_results group by status")
        return {row[0]: row[1] for row in rows}
