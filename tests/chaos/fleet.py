"""The daemons of an episode: real `maskd run` processes, each behind a proxy of its own, started again when they end."""

from __future__ import annotations

import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from chaos.host import SKEW_VARIABLE
from support.daemons import ROOT, environment, wait_until
from support.proxy import TcpProxy

SETTINGS = {
    "MASKD_LEASE_SECONDS": "2",
    "MASKD_DATABASE_TIMEOUT_SECONDS": "1",
    "MASKD_POLL_SECONDS": "2",
    "MASKD_POLL_UNPROVEN_SECONDS": "0.3",
    "MASKD_RETRY_SECONDS": "0.2",
    "MASKD_TIMEOUT_SECONDS": "10",
    "MASKD_DRAIN_SECONDS": "2",
    "MASKD_CPU_THREADS": "4",
    "MASKD_IO_THREADS": "4",
    "MASKD_CONCEPT": "mock",
    "MASKD_VISUAL": "mock",
    "MASKD_EVERYTHING": "mock",
    "MASKD_INPAINT": "mock",
    "MASKD_GENERATE": "mock",
}
EXPECTED_SECONDS = 40.0
TERMINATED = frozenset({0, -signal.SIGTERM})
"""How a daemon ends that is told to; the second, when it had just been started and did not listen yet."""
UNLIMITED = resource.RLIM_INFINITY


@dataclass(slots=True, eq=False)
class Member:
    """One daemon and all its lives. `log` has the lines of all of them; `expected` are the exit codes that the faults explain."""

    number: int
    proxy: TcpProxy
    folder: Path
    log: Path
    process: subprocess.Popen[bytes] | None = None
    state: int = 0
    paused: bool = False
    back_at: float = 0.0
    expected: frozenset[int] = frozenset()
    skew: float = 0.0

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def send(self, number: signal.Signals) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    def file_bytes_max(self, most: int) -> None:
        """No file that this process writes may grow beyond so many bytes (its log is a pipe)."""
        if self.running and self.process is not None:
            resource.prlimit(self.process.pid, resource.RLIMIT_FSIZE, (most, UNLIMITED))


class Fleet:
    """The daemons of one episode. Ended by pid, whatever happens."""

    def __init__(self, dsn: str, address: tuple[str, int], folder: Path, count: int, settings: Mapping[str, str]) -> None:
        self._dsn = dsn
        self._settings = {**SETTINGS, **settings}
        self._sinks: list[threading.Thread] = []
        self.unexpected: list[str] = []
        self.members = [Member(n, TcpProxy(*address), folder, folder / f"daemon-{n}.log") for n in range(count)]

    def start(self, member: Member) -> None:
        """One more life of this daemon."""
        _let_go(member)
        user, _, rest = self._dsn.partition("@")
        dsn = f"{user}@127.0.0.1:{member.proxy.port}/{rest.partition('/')[2]}"
        state = member.folder / f"state-{member.number}-{member.state}"
        values = environment(dsn, member.folder, **self._settings, MASKD_STATE_DIR=str(state))
        values[SKEW_VARIABLE] = str(member.skew)
        member.process = subprocess.Popen(
            [sys.executable, "-m", "tests.chaos.host", "run"],
            env=values, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        assert member.process.stdout is not None
        sink = threading.Thread(target=_copy, args=(member.process.stdout, member.log), daemon=True)
        sink.start()
        self._sinks.append(sink)
        member.paused = False
        member.expected = frozenset()

    def start_all(self) -> None:
        """Start them, and return once each claims."""
        for member in self.members:
            self.start(member)
        for member in self.members:
            wait_until(f"daemon {member.number} claims", lambda: "daemon.ready" in text(member), EXPECTED_SECONDS)  # noqa: B023

    def tend(self) -> None:
        """Start again whoever has ended, as systemd does; an end that no fault explains is remembered."""
        now = time.monotonic()
        for member in self.members:
            if member.process is None or member.process.poll() is None:
                continue
            code = member.process.returncode
            if code not in member.expected:
                self.unexpected.append(f"daemon {member.number} ended with {code}:\n{text(member)[-3000:]}")
                member.expected = frozenset({code})
            if now >= member.back_at:
                self.start(member)

    def stop(self) -> list[int]:
        """SIGTERM to all; their exit codes."""
        for member in self.members:
            member.send(signal.SIGTERM)
        return [member.process.wait(EXPECTED_SECONDS) for member in self.members if member.process is not None]

    def end(self) -> None:
        """Nothing of it is left, processes that are stopped included."""
        for member in self.members:
            if member.process is not None:
                member.process.kill()
                member.process.wait(10)
                _let_go(member)
            member.proxy.close()
        for sink in self._sinks:
            sink.join(5)

    def lines_about(self, words: str, most: int = 40) -> list[str]:
        """What the daemons logged with these words in it."""
        found = [
            f"    daemon {member.number}: {line[:400]}"
            for member in self.members
            for line in text(member).splitlines()
            if words in line
        ]
        return found[-most:]


def text(member: Member) -> str:
    """All that a daemon has logged in all its lives."""
    return member.log.read_text(errors="replace") if member.log.exists() else ""


def _let_go(member: Member) -> None:
    """Close our end of a process that is gone."""
    if member.process is not None and member.process.stdin is not None:
        member.process.stdin.close()


def _copy(source: BinaryIO | Any, log: Path) -> None:
    with source, log.open("ab", buffering=0) as sink:
        while data := source.read1(1 << 16):
            sink.write(data)
