"""A real pgbouncer before a test's database, in transaction or session mode; skipped, with a reason, where there is none."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from support.certificates import Authority
from support.daemons import wait_until
from support.database import Database

SETTINGS = """
[databases]
* = host={host} port={port}
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = {own_port}
unix_socket_dir =
auth_type = scram-sha-256
auth_file = {folder}/users
pool_mode = {mode}
default_pool_size = 10
server_round_robin = {round_robin}
"""
TLS = """
client_tls_sslmode = allow
client_tls_cert_file = {folder}/certificate
client_tls_key_file = {folder}/key
"""


@contextmanager
def pgbouncer(database: Database, mode: str, *, round_robin: bool = True, by: Authority | None = None) -> Iterator[str]:
    """The DSN of the database by way of a pooler in that mode. By `round_robin` the transactions of a client run on one server
    connection after the other, so that nothing a session keeps survives; else on the one used last, so that much does by luck.
    With `by` it speaks TLS with that certificate, to whoever asks for it."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.skip("pgbouncer is not installed (Debian: apt install pgbouncer)")
    parts = urlsplit(database.dsn)
    with tempfile.TemporaryDirectory(prefix="maskd-pgbouncer-") as name, socket.create_server(("127.0.0.1", 0)) as taken:
        folder, own_port = Path(name), taken.getsockname()[1]
        taken.close()
        folder.chmod(0o755)
        (folder / "users").write_text(f'"{parts.username}" "{unquote(parts.password or "")}"\n')
        own = {"own_port": own_port, "folder": folder, "mode": mode, "round_robin": int(round_robin)}
        ini = SETTINGS.format(host=database.host, port=database.port, **own)
        if by is not None:
            (folder / "certificate").write_bytes(by.certificate)
            (folder / "key").write_bytes(by.key)
            ini += TLS.format(folder=folder)
        (folder / "ini").write_text(ini)
        nobody = pwd.getpwnam("nobody").pw_uid if os.geteuid() == 0 else None  # it does not run as root
        process = subprocess.Popen([program, "-q", str(folder / "ini")], user=nobody, stderr=subprocess.DEVNULL)
        try:
            wait_until("pgbouncer listens", lambda: _answers(own_port))
            yield database.through(own_port)
        finally:
            process.kill()
            process.wait(10)


def _answers(port: int) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False
