"""The queue over each implementation of TaskStore."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
from support.database import Database
from support.postgrest import SERVICE_KEY, postgrest
from support.stores import Queue

from storage.base import TaskStore
from storage.postgres import PostgresStore
from storage.supabase import SupabaseStore


@pytest.fixture(params=["asyncpg", "rpc"])
def store(request: pytest.FixtureRequest, database: Database) -> Iterator[TaskStore]:
    """A store of each kind on one database, not open yet."""
    if request.param == "asyncpg":
        yield PostgresStore(database.dsn)
        return
    with postgrest(database.dsn) as server:
        yield SupabaseStore(server.url, SERVICE_KEY)


@pytest.fixture
async def queue(database: Database, store: TaskStore) -> AsyncIterator[Queue]:
    opened = await Queue.open(database, store)
    yield opened
    await opened.close()
