"""Processes of `bench.simulated`, and what they and the server did meanwhile: images, claims, processor time."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from support.daemons import ROOT

STOP_SECONDS_MAX = 60.0
DONE_SECONDS_MAX = 120.0


@dataclass(slots=True)
class Did:
    """What the daemons of a fleet did between two marks; `images` per process."""

    images: list[int] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    claims_ms: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0


class Fleet:
    """Daemons that run."""

    def __init__(self, processes: list[subprocess.Popen[str]]) -> None:
        self._processes = processes

    def mark(self) -> Did:
        """What was done since the last mark."""
        did = Did()
        for process in self._processes:
            found = self._ask(process, "mark")
            did.images.append(found["images"])
            did.calls.update(found["calls"])
            did.claims_ms += found["claims_ms"]
            did.cpu_seconds += found["cpu_seconds"]
        return did

    def stop(self) -> None:
        """Drain all and wait for their end."""
        for process in self._processes:
            assert process.stdin is not None
            process.stdin.close()
        for process in self._processes:
            process.wait(STOP_SECONDS_MAX)

    def _ask(self, process: subprocess.Popen[str], word: str) -> Any:
        assert process.stdin is not None
        process.stdin.write(word + "\n")
        process.stdin.flush()
        return answer_of(process)


@contextmanager
def fleet(
    dsn: str, daemons: int, image_seconds: float, batch: int, processes: int | None = None, **more: str | bool
) -> Iterator[Fleet]:
    """So many daemons, each in a process of its own unless `processes` says into how many they go; all claim. `more` are
    settings, and `turns`, as `bench.simulated.serve` has it."""
    count = processes or daemons
    asked = {"dsn": dsn, "daemons": daemons // count, "image_seconds": image_seconds, "batch": batch, **more}
    paths = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    values = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "bench.simulated", json.dumps(asked)]
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT, "env": values}
    started = [subprocess.Popen(command, **pipes) for _ in range(count)]
    try:
        for process in started:
            answer_of(process)
        yield Fleet(started)
    finally:
        for process in started:
            if process.poll() is None and process.stdin is not None and not process.stdin.closed:
                process.kill()
                process.wait()


def answer_of(process: subprocess.Popen[str]) -> Any:
    """The next line that a process says; its log goes elsewhere."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("{"):
            return json.loads(line)
    raise AssertionError(f"a fleet's process ended with {process.wait()}")


async def until_done(control: asyncpg.Connection[Any], rows: int) -> None:
    """Return once so many rows are done."""
    async with asyncio.timeout(DONE_SECONDS_MAX):
        while await control.fetchval("select count(*) from public.segmentation_results where status = 'done'") < rows:
            await pause(0.1)


async def pause(seconds: float) -> None:
    """Until the next look at other processes, or the next insert of a steady stream."""
    await asyncio.sleep(seconds)
