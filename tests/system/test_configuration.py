"""Mistakes in the settings end the program with 78 and a sentence each; nothing that it says holds a secret."""

from __future__ import annotations

import signal
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

import pytest
from support.daemons import environment, launch, wait_until
from support.database import Database
from support.proxy import tcp_proxy
from support.site import PHOTO_BOX, Site

PASSWORD = "p@ss/w:rd-0f-this-test"
SECRETS = {
    "R2_SECRET_ACCESS_KEY": "r2-secret-of-this-test",
    "R2_ACCESS_KEY_ID": "r2-id-of-this-test",
    "API_SECRET_KEY": "api-key-of-this-test",
}


def said_by(values: dict[str, str], folder: Path) -> list[str]:
    """What `maskd run` says before it ends with 78."""
    daemon = launch(values, folder)
    assert daemon.process.wait(30) == 78, daemon.log.read_text()
    return daemon.log.read_text().splitlines()


def test_every_mistake_is_told_in_one_line_without_a_value(tmp_path: Path) -> None:
    values = environment(
        f"mysql://me:{quote(PASSWORD, safe='')}@nowhere/db",
        tmp_path,
        MASKD_LEESE_SECONDS="7",
        MASKD_PORT="70000",
        MASKD_CPU_THREADS="many",
    )
    lines = said_by(values, tmp_path)
    assert [line.split()[0].rstrip(":") for line in lines] == [
        "MASKD_LEESE_SECONDS",
        "DATABASE_URL",
        "MASKD_PORT",
        "MASKD_CPU_THREADS",
    ]
    assert "did you mean MASKD_LEASE_SECONDS?" in lines[0]
    assert not any(word in "\n".join(lines) for word in (PASSWORD, quote(PASSWORD, safe=""), "70000", "many", "Traceback"))


def test_without_a_database_url_and_a_blob_store_both_are_asked_for(tmp_path: Path) -> None:
    values = environment("", tmp_path)
    del values["DATABASE_URL"], values["MASKD_BLOB_DIR"]
    lines = said_by(values, tmp_path)
    assert len(lines) == 2
    assert lines[0].startswith("DATABASE_URL is missing")
    assert "MASKD_BLOB_DIR" in lines[1]


def test_a_database_without_migrations_names_the_command_that_mends_it(empty_database: Database, tmp_path: Path) -> None:
    *_, last = said_by(environment(empty_database.dsn, tmp_path), tmp_path)
    assert "maskd migrate" in last


def test_a_wrong_password_is_a_configuration_error_and_is_not_shown(database: Database, tmp_path: Path) -> None:
    parts = urlsplit(database.dsn)
    wrong = urlunsplit(parts._replace(netloc=f"postgres:{quote(PASSWORD, safe='')}@{parts.hostname}:{parts.port}"))
    lines = said_by(environment(wrong, tmp_path), tmp_path)
    assert not any(word in "\n".join(lines) for word in (PASSWORD, quote(PASSWORD, safe=""), "Traceback"))


@pytest.mark.parametrize("form", ["json", "text"])
def test_no_log_line_of_a_daemon_in_trouble_holds_a_secret(site: Site, tmp_path: Path, form: str) -> None:
    role = f"role_of_{site.database.name}"
    site.queue.ask(f"create role {role} superuser login password '{PASSWORD}'")
    nowhere = {"R2_ENDPOINT": "http://127.0.0.1:9", "R2_BUCKET": "bucket", **SECRETS}
    with tcp_proxy(site.database.host, site.database.port) as proxy:
        dsn = f"postgresql://{role}:{quote(PASSWORD, safe='')}@127.0.0.1:{proxy.port}/{site.database.name}"
        settings = site.settings(
            dsn, MASKD_LOG_LEVEL="debug", MASKD_LOG_FORMAT=form, MASKD_DATABASE_TIMEOUT_SECONDS="1", **nowhere
        )
        daemon = launch(settings, tmp_path)
        try:
            wait_until("it claims", lambda: "daemon.ready" in daemon.log.read_text(), 60)
            site.queue.insert("segment_visual", {"boxes": [PHOTO_BOX]}, site.photo, 3)
            wait_until("the blob store is away", lambda: "gate.shut" in daemon.log.read_text(), 60)
            proxy.refuse()
            wait_until(
                "the database is away", lambda: "service" in daemon.log.read_text() and "wake.lost" in daemon.log.read_text(), 30
            )
            site.queue.ask(f"alter role {role} password 'another'")
            proxy.clear()  # from here on the password is refused
            wait_until("it says who refuses and waits", lambda: "gate.refused" in daemon.log.read_text(), 30)
            assert daemon.process.poll() is None, "a password that was changed while it ran ends no worker"
        finally:
            if daemon.process.poll() is None:
                daemon.send(signal.SIGKILL)
            daemon.process.wait(10)
            site.queue.ask(f"drop role {role}")
    said = daemon.log.read_text()
    assert [secret for secret in (PASSWORD, quote(PASSWORD, safe=""), *SECRETS.values()) if secret in said] == []
