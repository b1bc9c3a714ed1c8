"""Real daemons as real processes: `maskd run` in a process of its own, with signals sent by pid."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS_MAX = 60.0


@dataclass(slots=True, eq=False)
class DaemonProcess:
    """One running `maskd run`; `log` is the file with its JSON log lines."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int = 0
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def pid(self) -> int:
        return self.process.pid

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        self.process.kill()
        self.process.wait(10)

    def stop(self, timeout_seconds: float = 40.0) -> int:
        """SIGTERM; the exit code."""
        self.process.terminate()
        return self.process.wait(timeout_seconds)

    def lines(self) -> list[dict[str, Any]]:
        """The JSON lines logged so far."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                found.append({"event": line})
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line.get("event") == name]

    def get(self, path: str) -> tuple[int, str]:
        """Status and body of a GET."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


def environment(dsn: str, folder: Path, **settings: str) -> dict[str, str]:
    """The environment of a daemon: short lease, blobs in a folder unless `settings` say otherwise."""
    values = {
        "DATABASE_URL": dsn,
        "MASKD_STATE_DIR": str(folder / "state"),
        "MASKD_PORT": "0",
        "MASKD_LEASE_SECONDS": "2",
        "MASKD_CPU_THREADS": "2",
        "MASKD_LOG_FORMAT": "json",
        "MASKD_POLL_UNPROVEN_SECONDS": "0.5",
        **settings,
    }
    if "R2_ENDPOINT" not in values:
        values.setdefault("MASKD_BLOB_DIR", str(folder / "blobs"))
    kept = {
        name: value for name, value in os.environ.items() if not name.startswith(("MASKD_", "R2_", "SAM3_", "SUPABASE_", "HF_"))
    }
    return {**kept, **values}


def launch(values: Mapping[str, str], folder: Path, program: tuple[str, ...] = ("-m", "daemon")) -> DaemonProcess:
    """Start a daemon without waiting for it. `program` are the interpreter's arguments."""
    log = folder / f"daemon-{time.monotonic_ns()}.log"
    with log.open("wb") as sink:
        process = subprocess.Popen(
            [sys.executable, *program, "run"], env=dict(values), cwd=ROOT, stdout=sink, stderr=sink, stdin=subprocess.DEVNULL
        )
    return DaemonProcess(process, log, environment=values)


def wait_until(what: str, condition: Callable[[], bool], seconds: float = READY_SECONDS_MAX, every: float = 0.05) -> None:
    """Return once `condition()` holds; AssertionError that names `what` after `seconds`."""
    until = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > until:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(every)


def wait_ready(daemon: DaemonProcess) -> None:
    """Return once the daemon claims; fails with its log when it ends instead."""

    def ready() -> bool:
        if daemon.process.poll() is not None:
            raise AssertionError(f"the daemon ended with {daemon.process.returncode}:\n{daemon.log.read_text()[-4000:]}")
        listening = daemon.events("server.listening")
        if listening:
            daemon.port = int(listening[0]["port"])
        return bool(daemon.events("daemon.ready"))

    wait_until("daemon.ready", ready)


@contextmanager
def running(values: Mapping[str, str], folder: Path, program: tuple[str, ...] = ("-m", "daemon")) -> Iterator[DaemonProcess]:
    """A daemon that claims; killed at the end if it still runs."""
    daemon = launch(values, folder, program)
    try:
        wait_ready(daemon)
        yield daemon
    finally:
        if daemon.process.poll() is None:
            daemon.process.send_signal(signal.SIGCONT)
            daemon.kill()
