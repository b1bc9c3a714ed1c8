"""Applies `migrations/` to a database, each file in one transaction, under a lock; forward only.

Enters: a DSN. Leaves: the names applied. Keeps its own history in maskd.migrations, and Supabase's as far as that is ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from storage.base import ConfigurationError
from storage.postgres import translate
from storage.schema import migration_files, plain_file

LOCK_KEY = 7_102_026
SUPABASE_HISTORY = """
create schema if not exists supabase_migrations;
create table if not exists supabase_migrations.schema_migrations (version text primary key, statements text[], name text);
"""
RECORD = """
insert into supabase_migrations.schema_migrations as m (version, name, statements) values ($1, $2, $3)
    on conflict (version) do update set statements = excluded.statements where m.statements is null
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a migration would do."""

    applied: tuple[str, ...]
    pending: tuple[Path, ...]
    lacks_supabase: bool
    foreign_history: bool


async def migrate(dsn: str, *, plain: bool, dry_run: bool, said: Callable[[str], None], timeout_seconds: float = 120.0) -> Plan:
    """Bring the database up to date; `said` hears a line per step. Raises ConfigurationError with a sentence for the operator."""
    try:
        connection = await asyncpg.connect(
            dsn, timeout=10, command_timeout=timeout_seconds, server_settings={"application_name": "maskd migrate"}
        )
    except Exception as error:
        raise translate(error) from error
    try:
        async with asyncio.timeout(timeout_seconds):
            await connection.execute("select pg_advisory_lock($1)", LOCK_KEY)
        plan = await _plan(connection)
        if not dry_run:
            await _apply(connection, plan, plain, said)
        return plan
    except asyncpg.PostgresError as error:
        raise ConfigurationError(str(error)) from error
    finally:
        connection.terminate()


async def _plan(connection: asyncpg.Connection) -> Plan:
    applied: set[str] = set()
    if await connection.fetchval("select to_regclass('maskd.migrations') is not null"):
        applied = {row[0] for row in await connection.fetch("select version from maskd.migrations")}
    files = migration_files()
    history: set[str] = set()
    if await connection.fetchval("select to_regclass('supabase_migrations.schema_migrations') is not null"):
        history = {row[0] for row in await connection.fetch("select version from supabase_migrations.schema_migrations")}
    lacks = await connection.fetchval(
        "select to_regclass('auth.users') is null or to_regprocedure('auth.uid()') is null or to_regrole('service_role') is null"
    )
    return Plan(
        tuple(sorted(applied)),
        tuple(file for file in files if _version(file) not in applied),
        bool(lacks),
        not history <= {_version(file) for file in files},
    )


async def _apply(connection: asyncpg.Connection, plan: Plan, plain: bool, said: Callable[[str], None]) -> None:
    if plain:
        said("plain: roles, auth schema and publication, as far as they are missing")
        await _run(connection, plain_file())
    elif plan.lacks_supabase:
        raise ConfigurationError(
            "This database lacks what Supabase has (auth.users, auth.uid(), the role service_role). "
            "If it is a plain Postgres, run: maskd migrate --plain"
        )
    for file in plan.pending:
        said(f"apply {file.name}")
        await _run(connection, file)
    if plan.foreign_history:
        said("supabase history has migrations of its own: left alone")
    else:
        await _record(connection)


async def _run(connection: asyncpg.Connection, file: Path) -> None:
    async with connection.transaction():
        await connection.execute(_text(file))
    await connection.execute("reset all")


async def _record(connection: asyncpg.Connection) -> None:
    """So that `supabase migration list` agrees, and `supabase migration fetch` gets the files."""
    async with connection.transaction():
        await connection.execute(SUPABASE_HISTORY)
        await connection.executemany(
            RECORD,
            [
                (_version(file), file.stem.partition("_")[2], [_text(file).strip().removesuffix(";")])
                for file in migration_files()
            ],
        )


def _version(file: Path) -> str:
    return file.name.partition("_")[0]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8")
