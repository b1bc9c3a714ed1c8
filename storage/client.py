"""The other side of the queue: inserting tasks and reading them, for `maskd submit`, the demo, tests and benchmarks.

Here is what any such client does, and the one on asyncpg.
Enters: a DSN. Leaves: ids and rows. Writes nothing but what the Edge may write.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import asyncpg

from storage.base import ConfigurationError
from storage.postgres import translate
from storage.way import BY_DSN, Way, connect

LOOK_SECONDS = 0.05
FINAL = ("done", "error", "canceled")
COLUMNS = """id::text, kind, status, attempts, deaths, source_image_url, mask_image_url, masks_url, result_image_url,
  labels, metadata, error, extract(epoch from finished_at - created_at)::float8 as seconds"""


@dataclass(frozen=True, slots=True)
class Owner:
    """Whose tasks they are; keys lie under `uploads/{user_id}/`."""

    user_id: str
    project_id: str


class Client(Protocol):
    """Inserts tasks and reads them. Raises what a TaskStore raises."""

    async def close(self) -> None: ...

    async def owner(self, project_id: str | None) -> Owner:
        """The owner of a project; without one, that of the only project. ConfigurationError when there is none, or more."""
        ...

    async def insert(
        self,
        owner: Owner,
        kind: str,
        key: str | None,
        params: dict[str, Any],
        text: str | None = None,
        priority: int | None = None,
        after: str | None = None,
    ) -> str:
        """Insert one task; its id. It waits for the task `after`, if one is named."""
        ...

    async def rows(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """These tasks, in the order of `ids`, without those that there are not."""
        ...

    async def finished(self, ids: Sequence[str], timeout_seconds: float) -> list[dict[str, Any]]:
        """These tasks once all are final; TimeoutError when that takes too long."""
        ...


async def finished(
    look: Callable[[Sequence[str]], Awaitable[list[dict[str, Any]]]],
    ids: Sequence[str],
    timeout_seconds: float,
    every_seconds: float,
) -> list[dict[str, Any]]:
    """What `look` finds of these tasks once all are final; TimeoutError when that takes too long."""
    until = time.monotonic() + timeout_seconds
    while True:
        rows = await look(ids)
        if all(row["status"] in FINAL for row in rows):
            return rows
        if time.monotonic() > until:
            raise TimeoutError(f"{sum(row['status'] not in FINAL for row in rows)} of {len(ids)} tasks are not finished")
        await asyncio.sleep(every_seconds)


class TaskClient:
    """One connection that inserts and reads rows of segmentation_results."""

    def __init__(self, connection: asyncpg.Connection) -> None:
        self._connection = connection

    @classmethod
    async def connect(cls, dsn: str, timeout_seconds: float = 10.0, way: Way = BY_DSN) -> Self:
        try:
            connection = await connect(dsn, way, "maskd client", timeout_seconds, command_seconds=timeout_seconds)
        except Exception as error:
            raise translate(error) from error
        return cls(connection)

    async def close(self) -> None:
        self._connection.terminate()

    async def owner(self, project_id: str | None) -> Owner:
        """The owner of a project; without one, that of the only project, or of a local one made on a plain Postgres."""
        if project_id is not None:
            rows = await self._fetch("select user_id::text, id::text from public.projects where id = $1", project_id)
            if not rows:
                raise ConfigurationError(f"There is no project {project_id}")
            return Owner(*rows[0])
        rows = await self._fetch("select user_id::text, id::text from public.projects order by created_at limit 2")
        if len(rows) == 1:
            return Owner(*rows[0])
        if rows:
            raise ConfigurationError("There is more than one project: name one with --project")
        return await self._local_owner()

    async def insert(
        self,
        owner: Owner,
        kind: str,
        key: str | None,
        params: dict[str, Any],
        text: str | None = None,
        priority: int | None = None,
        after: str | None = None,
    ) -> str:
        """Insert one task; its id. It waits for the task `after`, if one is named."""
        rows = await self._fetch(
            """insert into public.segmentation_results (project_id, kind, source_image_url, text_prompt, params, priority, after)
               values ($1, $2, $3, $4, $5, $6, $7) returning id::text""",
            owner.project_id,
            kind,
            key,
            text,
            json.dumps(params),
            priority,
            after,
        )
        return str(rows[0][0])

    async def rows(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """These tasks, in the order of `ids`."""
        found = await self._fetch(f"select {COLUMNS} from public.segmentation_results where id = any ($1)", list(ids))  # noqa: S608 - constant
        by_id = {row["id"]: {**row, **{name: _json(row[name]) for name in ("labels", "metadata", "error")}} for row in found}
        return [by_id[task_id] for task_id in ids if task_id in by_id]

    async def finished(self, ids: Sequence[str], timeout_seconds: float) -> list[dict[str, Any]]:
        """These tasks once all are final; TimeoutError when that takes too long."""
        return await finished(self.rows, ids, timeout_seconds, LOOK_SECONDS)

    async def _local_owner(self) -> Owner:
        users = await self._fetch(
            "insert into auth.users (email) values ('local@localhost')"
            " on conflict (email) do update set email = excluded.email returning id::text"
        )
        projects = await self._fetch(
            "insert into public.projects (user_id, name) values ($1, 'local') returning id::text", users[0][0]
        )
        return Owner(users[0][0], projects[0][0])

    async def _fetch(self, query: str, *args: Any) -> list[asyncpg.Record]:
        try:
            rows: list[asyncpg.Record] = await self._connection.fetch(query, *args)
            return rows
        except Exception as error:
            raise translate(error) from error


def _json(value: str | None) -> Any:
    return None if value is None else json.loads(value)
