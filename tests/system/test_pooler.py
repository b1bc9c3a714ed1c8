"""Behind a real pooler: rows are drained without anything that a session keeps, and LISTEN is used where it can be."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import asyncpg
import pytest
from support.certificates import NAME, authority
from support.daemons import DaemonProcess, environment, wait_until
from support.database import Database, run
from support.pgbouncer import pgbouncer
from support.site import PHOTO, Site
from typer.testing import CliRunner

from daemon.cli import app
from storage.base import ConfigurationError
from storage.notify import NotifyWake
from storage.postgres import PostgresStore
from storage.schema import migration_files
from storage.way import Way, is_transaction_pooler, look

ROWS = 300
TRANSACTION = {"MASKD_DB_POOLER": "transaction"}


@pytest.fixture
def transaction_dsn(site: Site) -> Iterator[str]:
    with pgbouncer(site.database, "transaction") as dsn:
        yield dsn


@pytest.fixture
def session_dsn(site: Site) -> Iterator[str]:
    with pgbouncer(site.database, "session") as dsn:
        yield dsn


def health(daemon: DaemonProcess) -> dict[str, object]:
    return dict(json.loads(daemon.get("/health")[1]))


def maskd(dsn: str, folder: Path, *arguments: str) -> str:
    """What a command says that goes through a pooler in transaction mode; it must go well."""
    done = CliRunner().invoke(app, arguments, env=environment(dsn, folder, **TRANSACTION))
    assert done.exit_code == 0, done.exception
    return done.stdout


def test_two_daemons_drain_rows_through_a_pooler_in_transaction_mode_each_once(site: Site, transaction_dsn: str) -> None:
    with (
        site.daemon("noop", dsn=transaction_dsn, **TRANSACTION) as one,
        site.daemon("noop", dsn=transaction_dsn, **TRANSACTION) as other,
    ):
        ids: list[str] = []
        for _ in range(ROWS // 10):
            ids += site.queue.insert("noop", {"blob": True}, None, 10)
        rows = site.queue.finished(ids)
        for daemon in (one, other):
            assert health(daemon)["wake"] == "poll"
            assert [line["level"] for line in daemon.events("wake.poll_only")] == ["warning"]
            assert daemon.stop() == 0
            assert [line for line in daemon.lines() if line.get("level") == "error"] == []
    assert site.queue.ends(ids) == {"done": len(ids)}
    assert Counter((row["status"], row["attempts"]) for row in rows) == {("done", 1): len(ids)}
    assert site.stored() == site.published()


def test_commands_work_through_a_pooler_in_transaction_mode(site: Site, transaction_dsn: str, tmp_path: Path) -> None:
    ids = site.queue.insert("noop", {}, None, 3)
    site.queue.ask('update public.segmentation_results set status = \'error\', error = \'{"code": "internal", "message": "x"}\'')
    assert maskd(transaction_dsn, tmp_path, "retry", "--error", "internal") == "3 put back\n"
    found = json.loads(maskd(transaction_dsn, tmp_path, "status", "--json"))
    assert [row["count"] for row in found["tasks"]] == [len(ids)]
    assert "pending" in maskd(transaction_dsn, tmp_path, "submit", str(PHOTO), "--project", site.queue.project)


def test_migrations_go_through_a_pooler_in_transaction_mode_and_leave_no_setting_behind(
    empty_database: Database, tmp_path: Path
) -> None:
    async def lock_timeout(dsn: str) -> str:
        connection = await asyncpg.connect(dsn, statement_cache_size=0)
        shown = await connection.fetchval("show lock_timeout")
        connection.terminate()
        return str(shown)

    with pgbouncer(empty_database, "transaction") as dsn:
        assert maskd(dsn, tmp_path, "migrate", "--plain").count("apply ") == len(migration_files())
        assert f"up to date ({len(migration_files())} migrations, none of them new)\n" in maskd(dsn, tmp_path, "migrate")
        assert {run(lock_timeout(dsn)) for _ in range(5)} == {"0"}  # round robin: whichever connection it was


def test_a_pooler_in_session_mode_tells_of_rows_at_once(site: Site, session_dsn: str) -> None:
    with site.daemon("noop", dsn=session_dsn, MASKD_POLL_SECONDS="1000") as daemon:
        wait_until("push is proven", lambda: health(daemon)["wake"] == "push", 30)
        ids = site.queue.insert("noop", {}, None, 20)
        site.queue.finished(ids, 15)
        assert daemon.stop() == 0
    assert site.queue.ends(ids) == {"done": len(ids)}


def test_a_daemon_works_and_listens_over_tls_that_is_verified(site: Site, tmp_path: Path) -> None:
    ours = authority(tmp_path)
    with pgbouncer(site.database, "session", by=ours) as dsn:
        by_name = site.database.through(urlsplit(dsn).port or 0, NAME)
        with site.daemon("noop", dsn=by_name, MASKD_DB_CA=str(ours.ca_file), MASKD_POLL_SECONDS="1000") as daemon:
            wait_until("push is proven", lambda: health(daemon)["wake"] == "push", 30)
            ids = site.queue.insert("noop", {}, None, 20)
            site.queue.finished(ids, 15)
            assert daemon.stop() == 0
    assert site.queue.ends(ids) == {"done": len(ids)}


@pytest.mark.anyio
async def test_a_pooler_in_transaction_mode_on_any_port_is_no_proof_of_push(site: Site) -> None:
    with (
        pgbouncer(site.database, "transaction", round_robin=False) as dsn,  # where a connection hears itself by luck
        pytest.raises(ConfigurationError, match=r"transaction mode .* MASKD_DB_POOLER=transaction"),
    ):
        await NotifyWake(dsn, timeout_seconds=2).prove()


@pytest.mark.anyio
async def test_a_pooler_in_transaction_mode_that_nobody_told_of_is_named_by_the_setting(transaction_dsn: str) -> None:
    store = PostgresStore(transaction_dsn)

    async def overlap() -> None:
        for _ in range(60):
            await asyncio.gather(*[store.status() for _ in range(5)])

    with pytest.raises(ConfigurationError, match=r"26000: .* set MASKD_DB_POOLER=transaction"):
        await overlap()
    await store.close()


@pytest.mark.anyio
async def test_a_parameter_that_a_pooler_does_not_take_is_a_configuration_error(transaction_dsn: str) -> None:
    store = PostgresStore(f"{transaction_dsn}?search_path=public")
    with pytest.raises(ConfigurationError, match="unsupported startup parameter: search_path"):
        await store.open()


@pytest.mark.anyio
async def test_a_pooler_in_session_mode_proves_push_and_shows_that_it_is_there(site: Site, session_dsn: str) -> None:
    await NotifyWake(session_dsn, timeout_seconds=10).prove()
    assert (await look(session_dsn, Way(), 10)).pooled
    assert not (await look(site.database.dsn, Way(), 10)).pooled


@pytest.mark.parametrize(
    ("dsn", "pooler", "expected"),
    [
        ("postgresql://u:p@h:6543/x", "auto", True),
        ("postgresql:///x?host=h&port=6543", "auto", True),
        ("postgresql://u:p@h:5432/x", "auto", False),
        ("postgresql://u:p@h/x", "auto", False),
        ("postgresql://u:p@h:6543/x", "none", False),
        ("postgresql://u:p@h:7000/x", "transaction", True),
    ],
)
def test_the_port_tells_a_transaction_pooler_unless_the_setting_does(dsn: str, pooler: str, expected: bool) -> None:
    assert is_transaction_pooler(dsn, Way(None, pooler)) is expected
