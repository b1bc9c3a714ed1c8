"""A command on a terminal of its own: what it shows there, and keys that are pressed."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from support.daemons import ROOT


@dataclass(slots=True, eq=False)
class Terminal:
    """The master's side of a terminal with a running command; `shown` are the bytes so far."""

    fd: int
    process: subprocess.Popen[bytes]
    shown: bytes = b""

    def expect(self, text: str, seconds: float = 30.0) -> None:
        """Return once the terminal has shown that; AssertionError with what it has shown instead."""
        until = time.monotonic() + seconds
        while text.encode() not in self.shown:
            assert time.monotonic() < until, self.shown.decode(errors="replace")[-3000:]
            if not self._read(0.5):
                break
        assert text.encode() in self.shown, self.shown.decode(errors="replace")[-3000:]

    def press(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def wait(self, seconds: float = 30.0) -> int:
        """The exit code; what is still shown is read."""
        until = time.monotonic() + seconds
        while self._read(0.2) and time.monotonic() < until:
            pass
        return self.process.wait(max(until - time.monotonic(), 1))

    def _read(self, seconds: float) -> bool:
        """Whether the command may still show something."""
        if not select.select([self.fd], [], [], seconds)[0]:
            return self.process.poll() is None
        try:
            found = os.read(self.fd, 65536)
        except OSError:  # nobody has the other side open any more
            return False
        self.shown += found
        return bool(found)


@contextmanager
def terminal(values: Mapping[str, str], *arguments: str, columns: int = 80, rows: int = 24) -> Iterator[Terminal]:
    """`maskd` with these arguments on a terminal of that size; killed at the end if it still runs."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def take() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", *arguments],
        env={**values, "TERM": "xterm-256color"},
        cwd=ROOT,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=take,
    )
    os.close(slave)
    try:
        yield Terminal(master, process)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait(10)
        os.close(master)
