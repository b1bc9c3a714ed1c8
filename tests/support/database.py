"""A real Postgres for the tests: one server a session, one fresh database a test, made from a migrated template.

`database` is what most tests want. `empty_database` has no migrations in it. `private_database` stands on a server of its
own, which the test may restart and kill. All fixtures are synchronous, so tests of either kind may use them.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
from collections.abc import Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

import asyncpg
import pytest

from storage.embedded import EmbeddedPostgres
from storage.schema import migration_files, plain_file

Answer = TypeVar("Answer")

URL_VARIABLE = "MASKD_TEST_DATABASE_URL"


@dataclass(frozen=True, slots=True)
class Server:
    """A Postgres server; `embedded` is None when MASKD_TEST_DATABASE_URL named one that is not ours to restart."""

    dsn: str
    embedded: EmbeddedPostgres | None


@dataclass(frozen=True, slots=True)
class Database:
    """A database of one test. `dsn` is good for asyncpg and psql."""

    name: str
    dsn: str
    server: Server

    @property
    def host(self) -> str:
        """Where a proxy put before the server must connect to."""
        return urlsplit(self.dsn).hostname or "127.0.0.1"

    @property
    def port(self) -> int:
        return urlsplit(self.dsn).port or 5432

    @property
    def embedded(self) -> EmbeddedPostgres:
        """The server to restart or kill; only a `private_database` is sure to have one."""
        assert self.server.embedded is not None, "this server is not ours to restart: use the fixture private_database"
        return self.server.embedded

    def through(self, port: int, host: str = "127.0.0.1") -> str:
        """The DSN by way of a proxy that listens on `host:port`."""
        parts = urlsplit(self.dsn)
        user = parts.netloc.rpartition("@")[0]
        return urlunsplit(parts._replace(netloc=f"{user}@{host}:{port}"))

    async def connect(self) -> asyncpg.Connection[Any]:
        """A connection as superuser, without pool or statement cache; the caller closes it."""
        return await asyncpg.connect(self.dsn, statement_cache_size=0)

    def execute(self, sql: str) -> None:
        """Run SQL, several statements too, on a connection of its own; for tests and fixtures that are not async."""
        run(_execute(self.dsn, sql))


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Server]:
    """The server of this test run: the one that MASKD_TEST_DATABASE_URL names (a superuser's DSN), else an embedded one."""
    given = os.environ.get(URL_VARIABLE)
    if given:
        yield Server(given, None)
        return
    with EmbeddedPostgres.start() as embedded:
        yield Server(embedded.dsn, embedded)


@pytest.fixture(scope="session")
def database_template(postgres_server: Server) -> Iterator[str]:
    """The name of a database in which the shim and every migration have run."""
    name = f"maskd_template_{secrets.token_hex(4)}"
    run(_execute(postgres_server.dsn, f"create database {name}"))
    try:
        run(migrate(dsn_of(postgres_server, name)))
        run(_execute(postgres_server.dsn, f"alter database {name} with allow_connections false"))
        yield name
    finally:
        run(_execute(postgres_server.dsn, f"drop database if exists {name} with (force)"))


@pytest.fixture
def database(postgres_server: Server, database_template: str) -> Iterator[Database]:
    """A fresh database with all migrations applied, dropped after the test."""
    yield from _made(postgres_server, database_template)


@pytest.fixture(scope="module")
def module_database(postgres_server: Server, database_template: str) -> Iterator[Database]:
    """The same for all tests of a module, where one daemon serves them."""
    yield from _made(postgres_server, database_template)


@pytest.fixture
def empty_database(postgres_server: Server) -> Iterator[Database]:
    """A fresh database with nothing in it: neither Supabase's roles and schemas nor our migrations."""
    yield from _made(postgres_server, "template0")


@pytest.fixture
def private_database() -> Iterator[Database]:
    """A migrated database on an embedded server of its own, which the test may restart, stop and kill."""
    with EmbeddedPostgres.start() as embedded:
        server = Server(embedded.dsn, embedded)
        run(migrate(server.dsn))
        yield Database("postgres", server.dsn, server)


async def migrate(dsn: str) -> None:
    """Apply the shim and the migrations in order, each file in one transaction; AssertionError names the line that fails."""
    connection = await asyncpg.connect(dsn, statement_cache_size=0)
    try:
        for file in [plain_file(), *migration_files()]:
            await _apply(connection, file)
    finally:
        await connection.close()


def dsn_of(server: Server, name: str) -> str:
    """The server's DSN, on the database `name`."""
    return urlunsplit(urlsplit(server.dsn)._replace(path=f"/{name}"))


def run(coroutine: Coroutine[Any, Any, Answer]) -> Answer:
    """Run a coroutine to its end in a thread and a loop of its own, so that a running loop does not mind."""
    answers: list[Answer] = []
    failures: list[BaseException] = []

    def work() -> None:
        try:
            answers.append(asyncio.run(coroutine))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]
    return answers[0]


def _made(server: Server, template: str) -> Iterator[Database]:
    name = f"maskd_test_{secrets.token_hex(6)}"
    # Copying files is the faster way where a checkpoint costs nothing, as on our server without fsync.
    strategy = "file_copy" if server.embedded else "wal_log"
    run(_execute(server.dsn, f"create database {name} template {template} strategy {strategy}"))
    try:
        yield Database(name, dsn_of(server, name), server)
    finally:
        run(_execute(server.dsn, f"drop database if exists {name} with (force)"))


async def _execute(dsn: str, sql: str) -> None:
    connection = await asyncpg.connect(dsn, statement_cache_size=0)
    try:
        await connection.execute(sql)
    finally:
        await connection.close()


async def _apply(connection: asyncpg.Connection[Any], file: Path) -> None:
    sql = file.read_text()
    try:
        async with connection.transaction():
            await connection.execute(sql)
    except asyncpg.PostgresError as error:
        line = sql.count("\n", 0, int(getattr(error, "position", None) or 1)) + 1
        raise AssertionError(f"{file.name}:{line}: {error}") from error
