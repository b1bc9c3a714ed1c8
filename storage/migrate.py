"""Applies `migrations/` to a database, each file in one transaction, under a lock of that transaction; forward only.

Enters: a DSN. Leaves: the names applied. Keeps its own history in maskd.migrations, and Supabase's as far as that is ours.
Nothing is left to the session, which a pooler in transaction mode would not keep.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import asyncpg

from storage.base import ConfigurationError, UnavailableError
from storage.postgres import translate
from storage.schema import migration_files, plain_file
from storage.way import BY_DSN, Way, connect

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


async def migrate(
    dsn: str, *, plain: bool, dry_run: bool, said: Callable[[str], None], timeout_seconds: float = 120.0, way: Way = BY_DSN
) -> Plan:
    """Bring the database up to date; `said` hears a line per step. Raises ConfigurationError with a sentence for the operator."""
    try:
        connection = await connect(dsn, way, "maskd migrate", 10, command_seconds=timeout_seconds)
    except Exception as error:
        raise translate(error) from error
    try:
        plan = await _plan(connection)
        if not dry_run:
            await _apply(connection, plan, plain, said)
        return plan
    except asyncpg.PostgresError as error:
        raise ConfigurationError(str(error)) from error
    except TimeoutError as error:
        raise UnavailableError(f"a statement took longer than {timeout_seconds:g} s; does somebody else migrate?") from error
    finally:
        connection.terminate()


async def _plan(connection: asyncpg.Connection) -> Plan:
    applied = await _applied(connection)
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
        async with _alone(connection):
            await connection.execute(_text(plain_file()))
    elif plan.lacks_supabase:
        raise ConfigurationError(
            "This database lacks what Supabase has (auth.users, auth.uid(), the role service_role). "
            "If it is a plain Postgres, run: maskd migrate --plain"
        )
    for file in plan.pending:
        async with _alone(connection):
            if _version(file) in await _applied(connection):
                continue  # by somebody else, who held the lock before
            said(f"apply {file.name}")
            await connection.execute(_text(file))
    if plan.foreign_history:
        said("supabase history has migrations of its own: left alone")
    else:
        await _record(connection)


@asynccontextmanager
async def _alone(connection: asyncpg.Connection) -> AsyncIterator[None]:
    """A transaction in which nobody else migrates, and whose settings end with it."""
    async with connection.transaction():
        await connection.execute(f"select pg_advisory_xact_lock({LOCK_KEY})")
        # Touching a table makes the session hear of what others created while it waited; waiting alone does not.
        await connection.execute("select from pg_catalog.pg_namespace limit 0")
        yield
        await connection.execute("reset all")


async def _applied(connection: asyncpg.Connection) -> set[str]:
    if not await connection.fetchval("select to_regclass('maskd.migrations') is not null"):
        return set()
    return {row[0] for row in await connection.fetch("select version from maskd.migrations")}


async def _record(connection: asyncpg.Connection) -> None:
    """So that `supabase migration list` agrees, and `supabase migration fetch` gets the files."""
    async with _alone(connection):
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
