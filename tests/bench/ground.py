"""What every benchmark stands on: one embedded Postgres, fresh migrated databases in it, rows, and the facts of this host.

Connections go over the unix socket where there is one, so that the queue is measured and not the loopback.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import asyncpg
from support.database import migrate

from storage.embedded import EmbeddedPostgres

KIND = "noop"
OTHER_KIND = "noop_elsewhere"
SECONDS_MAX = 60.0  # for one round of one side: a side that stands still is a failure, not a figure
MEASURED = ("asyncpg", "pgqueuer", "procrastinate", "uvloop")

INSERT = """insert into public.segmentation_results (project_id, kind, source_image_url)
  select $1, $2, $3 from generate_series(1, $4::integer)"""


@dataclass(slots=True)
class Ground:
    """A server with databases made from one migrated template."""

    server: EmbeddedPostgres
    numbers: Iterator[int] = field(default_factory=count)

    def database(self, template: str = "maskd_bench") -> str:
        """The DSN of a fresh database that knows the no-op kinds."""
        name = f"bench_{next(self.numbers)}"
        asyncio.run(self.execute(f"create database {name} template {template} strategy file_copy"))
        return self.dsn(name)

    def empty_database(self) -> str:
        """The DSN of a fresh database with nothing in it."""
        return self.database("template0")

    def dsn(self, name: str) -> str:
        dsn = self.server.socket_dsn or self.server.dsn
        return dsn.replace("/postgres?", f"/{name}?") if "?" in dsn else dsn.removesuffix("postgres") + name

    async def execute(self, sql: str) -> None:
        connection = await asyncpg.connect(self.server.dsn)
        try:
            await connection.execute(sql)
        finally:
            await connection.close()


@contextmanager
def ground(server_settings: Mapping[str, str] | None = None) -> Iterator[Ground]:
    """A server for this run, with a template in which every migration has run. Without settings of its own it does not sync."""
    with EmbeddedPostgres.start(settings=server_settings) as server:
        made = Ground(server)
        asyncio.run(made.execute("create database maskd_bench"))
        asyncio.run(_make_template(made.dsn("maskd_bench")))
        yield made


async def _make_template(dsn: str) -> None:
    await migrate(dsn)
    connection = await asyncpg.connect(dsn)
    await connection.executemany("insert into maskd.kinds (kind) values ($1)", [(KIND,), (OTHER_KIND,)])
    await connection.close()


async def add_owner(connection: asyncpg.Connection[Any]) -> tuple[str, str]:
    """A new user and a project of theirs."""
    user = await connection.fetchval("insert into auth.users default values returning id::text")
    project = await connection.fetchval("insert into public.projects (user_id) values ($1) returning id::text", user)
    return user, project


async def fill(connection: asyncpg.Connection[Any], rows: int, kind: str = KIND) -> None:
    """Nothing but `rows` pending rows of one new user, inserted as users insert, then vacuumed and analysed."""
    _, project = await add_owner(connection)
    await connection.execute("truncate public.segmentation_results")
    await connection.execute(INSERT, project, kind, None, rows)
    await connection.execute("vacuum analyze public.segmentation_results")


def host_facts(server: EmbeddedPostgres) -> str:
    """Cores, versions and load, in one line."""
    postgres = asyncio.run(_postgres_version(server.dsn))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in MEASURED)
    load = os.getloadavg()[0]
    return f"{os.cpu_count()} cores, load {load:.1f}, Python {platform.python_version()}, Postgres {postgres}, {versions}"


async def _postgres_version(dsn: str) -> str:
    connection = await asyncpg.connect(dsn)
    try:
        return str(await connection.fetchval("show server_version"))
    finally:
        await connection.close()
