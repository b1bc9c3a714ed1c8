"""MASKD_DB_CA: chain and host name are verified against that file, for everything that connects."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from support.certificates import NAME, Authority, authority
from support.daemons import ROOT, environment
from support.database import Database
from support.pgbouncer import pgbouncer
from support.site import PHOTO
from typer.testing import CliRunner

from daemon.cli import app
from storage.base import ConfigurationError
from storage.client import TaskClient
from storage.notify import NotifyWake
from storage.postgres import PostgresStore, translate
from storage.way import Seen, Way, look, tls

pytestmark = pytest.mark.anyio


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return authority(tmp_path)


@pytest.fixture
def port(database: Database, ours: Authority) -> Iterator[int]:
    """Where a pooler speaks TLS, with a certificate for `localhost`; the embedded Postgres is built without."""
    with pgbouncer(database, "session", by=ours) as dsn:
        yield urlsplit(dsn).port or 0


async def seen(dsn: str, ca_file: Path | None = None) -> Seen:
    try:
        return await look(dsn, Way(None if ca_file is None else tls(str(ca_file))), 10)
    except Exception as error:
        raise translate(error) from error


async def test_the_way_tells_what_it_is_like(database: Database, port: int, ours: Authority) -> None:
    by_name = database.through(port, NAME)
    verified = await seen(by_name, ours.ca_file)
    assert (verified.tls, verified.verified, verified.local, verified.pooled) == ("TLSv1.3", True, True, True)
    assert not (await seen(f"{by_name}?sslmode=require")).verified
    assert (await seen(f"{by_name}?sslmode=disable")).tls is None


async def test_the_file_wins_over_an_sslmode_that_asks_for_less(database: Database, port: int, ours: Authority) -> None:
    by_name = database.through(port, NAME)
    assert (await seen(f"{by_name}?sslmode=disable", ours.ca_file)).verified


async def test_another_authority_and_another_name_are_refused_by_everything_that_connects(
    database: Database, port: int, ours: Authority, tmp_path: Path
) -> None:
    theirs = authority(tmp_path, "theirs")
    wrong_authority = (database.through(port, NAME), Way(tls(str(theirs.ca_file))))
    wrong_name = (database.through(port, "127.0.0.1"), Way(tls(str(ours.ca_file))))
    for dsn, way in (wrong_authority, wrong_name):
        store = PostgresStore(dsn, way=way)
        for connecting in (store.open(), NotifyWake(dsn, way=way).prove(), TaskClient.connect(dsn, way=way)):
            with pytest.raises(ConfigurationError, match=r"certificate is not accepted .* MASKD_DB_CA"):
                await connecting
        await store.close()


async def test_a_server_without_tls_is_refused_when_it_must_be_verified(database: Database, ours: Authority) -> None:
    with pytest.raises(ConfigurationError, match="speaks no TLS"):
        await seen(database.dsn, ours.ca_file)


@pytest.mark.parametrize(("content", "told"), [(None, "cannot be read: No such file"), ("hello", "holds no certificate")])
async def test_a_file_that_is_missing_or_no_certificate_is_named_by_its_setting(
    tmp_path: Path, content: str | None, told: str
) -> None:
    file = tmp_path / "some.crt"
    if content is not None:
        file.write_text(content)
    with pytest.raises(ConfigurationError, match=f"MASKD_DB_CA: the file {told}"):
        tls(str(file))


def test_a_file_that_is_missing_ends_a_start_with_78(database: Database, tmp_path: Path) -> None:
    done = maskd(database.dsn, tmp_path, "run", MASKD_DB_CA=str(tmp_path / "nowhere.crt"))
    assert (done.returncode, done.stdout) == (78, ""), done.stderr
    assert done.stderr.startswith("MASKD_DB_CA: the file cannot be read"), done.stderr


def test_commands_verify_the_server(database: Database, port: int, ours: Authority, tmp_path: Path) -> None:
    theirs = authority(tmp_path, "theirs")
    by_name = database.through(port, NAME)
    done = maskd(by_name, tmp_path, "submit", str(PHOTO), MASKD_DB_CA=str(ours.ca_file))
    assert done.returncode == 0, done.stderr
    untrusting = environment(by_name, tmp_path, MASKD_DB_CA=str(theirs.ca_file))
    for arguments in (["migrate"], ["status"], ["submit", str(PHOTO)], ["retry", "--error", "internal"]):
        error = CliRunner().invoke(app, arguments, env=untrusting).exception
        assert isinstance(error, ConfigurationError), error
        assert "certificate is not accepted" in str(error)
    refused = maskd(by_name, tmp_path, "run", MASKD_DB_CA=str(theirs.ca_file))
    assert (refused.returncode, "certificate is not accepted" in refused.stderr) == (78, True), refused.stderr


def maskd(dsn: str, folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "daemon", *arguments]
    values = environment(dsn, folder, **settings)
    return subprocess.run(command, env=values, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
