"""The embedded Postgres: it answers on both ways in, survives what tests do to it, and never outlives its parent."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import asyncpg
import psutil
import pytest
from support.database import Database

from storage.embedded import EmbeddedPostgres

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]
ORPHAN = """
import os, psutil, signal
from storage.embedded import EmbeddedPostgres
server = EmbeddedPostgres.start()
print(server.folder, *(child.pid for child in psutil.Process().children()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


async def value(dsn: str, sql: str) -> object:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetchval(sql)
    finally:
        await connection.close()


def wait_for_end(pid: int) -> None:
    """Return once the process has ended, whether or not anybody has collected its exit status."""
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=10)


async def test_both_dsns_reach_the_same_database(private_database: Database) -> None:
    server = private_database.embedded
    assert server.socket_dsn is not None
    assert await value(server.dsn, "select inet_server_port()") == server.port
    assert await value(server.socket_dsn, "select inet_server_port()") is None


async def test_the_tcp_way_in_asks_for_the_password(private_database: Database) -> None:
    with pytest.raises(asyncpg.InvalidPasswordError):
        await asyncpg.connect(private_database.dsn.replace(private_database.embedded.password, "wrong"))


async def test_psql_understands_the_dsn(private_database: Database) -> None:
    command = [private_database.embedded.bin_folder / "psql", private_database.dsn, "-Atc", "select 42"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "42\n"


async def test_committed_rows_and_the_port_survive_restart_and_crash(private_database: Database) -> None:
    private_database.execute("create table kept (n int); insert into kept values (7)")
    server = private_database.embedded
    server.restart()
    assert await value(private_database.dsn, "select n from kept") == 7
    server.kill()
    with pytest.raises(OSError, match="Connect call failed"):
        await asyncpg.connect(private_database.dsn)
    server.up()
    assert await value(private_database.dsn, "select n from kept") == 7


async def test_a_named_folder_keeps_its_data_between_starts() -> None:
    with tempfile.TemporaryDirectory(prefix="maskd-kept-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # as root the server runs as somebody else, who must be able to walk here
        with EmbeddedPostgres.start(folder) as server:
            await value(server.dsn, "create table kept as select 7 as n")
        with EmbeddedPostgres.start(folder) as server:
            assert await value(server.dsn, "select n from kept") == 7


def test_stopping_leaves_neither_process_nor_folder() -> None:
    server = EmbeddedPostgres.start()
    pid = server.pid
    server.stop()
    server.stop()
    assert server.pid is None
    assert not server.folder.exists()
    assert pid is not None
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_killed_parent_takes_the_server_and_its_folder_along() -> None:
    orphaned = subprocess.run([sys.executable, "-c", ORPHAN], cwd=ROOT, capture_output=True, text=True, check=False)
    folder, *children = orphaned.stdout.split()
    assert len(children) == 2, "a server and its watcher"
    for pid in children:
        wait_for_end(int(pid))
    assert not Path(folder).exists()


async def test_every_test_gets_a_database_of_its_own(database: Database) -> None:
    assert await value(database.dsn, "select current_database()") == database.name
