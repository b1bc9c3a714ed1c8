"""A real redis-server for tests, on a socket in a folder of its own; skipped, with a reason, where there is none."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.daemons import wait_until


@contextmanager
def redis_server(folder: Path) -> Iterator[str]:
    """The URL of a server that is killed at the end."""
    program = shutil.which("redis-server")
    pytest.importorskip("redis", reason="needs the extra [redis]")
    if program is None:
        pytest.skip("redis-server is not installed (Debian: apt install redis-server)")
    socket = folder / "redis.sock"
    command = [program, "--port", "0", "--unixsocket", str(socket), "--save", "", "--dir", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        wait_until("redis-server listens", socket.exists)
        yield f"unix://{socket}"
    finally:
        process.kill()
        process.wait(10)
