"""Pick-up: how long an idle worker takes from just before COMMIT of one insert to the start of the handler.

maskd's daemon against a minimal LISTEN + claim loop on the same table; another process inserts, as the Edge does.
"""

from __future__ import annotations

import asyncio
import os
import random
import sys
from asyncio.subprocess import PIPE
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from itertools import chain

import asyncpg
import uvloop
from bench.ground import Ground, add_owner
from bench.noop import Noop, settled, worker
from bench.plain import listener
from bench.report import Report, percentile

BLOCKS = 10
SAMPLES = 60
WARM_SAMPLES = 10
IDLE_SECONDS = (0.005, 0.015)  # so that each row meets a worker that waits, at no fixed phase of anything


def run(ground: Ground, report: Report) -> None:
    """Measure in interleaved blocks."""
    report.title("pickup", f"one row for an idle worker, from before COMMIT to handler start, {BLOCKS * SAMPLES} samples a side")
    dsn = ground.database()
    mine: list[list[float]] = []
    bare: list[list[float]] = []
    for _ in range(BLOCKS):
        mine.append(uvloop.run(ours(dsn)))
        bare.append(uvloop.run(theirs(dsn)))
    for percent in (50, 95, 99):
        report.side(f"maskd p{percent}", [percentile(block, percent) for block in mine], "ms")
        report.side(f"LISTEN + claim loop p{percent}", [percentile(block, percent) for block in bare], "ms")
    # A tail needs all samples: the p99 of one block would be its worst sample.
    for percent, most in ((50, 1.3), (99, 2.0)):
        mine_ms, bare_ms = percentile(list(chain(*mine)), percent), percentile(list(chain(*bare)), percent)
        name = f"p{percent} of all samples, {mine_ms:.2f} / {bare_ms:.2f} ms"
        report.at_most(name, [mine_ms / bare_ms], most)


async def ours(dsn: str) -> list[float]:
    """A block of the daemon's latencies in ms."""
    noop = Noop()
    async with worker(dsn, noop) as daemon:

        async def insert_and_wait(commit: Callable[[], Awaitable[float]]) -> float:
            done = noop.expect(1)
            before = await commit()
            await done.wait()
            await settled(daemon)
            return noop.started_at - before

        return await block(dsn, insert_and_wait)


async def theirs(dsn: str) -> list[float]:
    """A block of the minimal loop's latencies in ms."""
    async with listener(dsn) as loop:

        async def insert_and_wait(commit: Callable[[], Awaitable[float]]) -> float:
            loop.idle.clear()
            before = await commit()
            await loop.idle.wait()
            return loop.started_at - before

        return await block(dsn, insert_and_wait)


async def block(dsn: str, sample: Callable[[Callable[[], Awaitable[float]]], Awaitable[float]]) -> list[float]:
    """Latencies in ms of one row after the other; the first few only warm up."""
    control = await asyncpg.connect(dsn)
    await control.execute("truncate public.segmentation_results")
    _, project = await add_owner(control)
    await control.close()
    latencies = []
    async with inserter(dsn, project) as insert:
        for _ in range(WARM_SAMPLES + SAMPLES):
            latencies.append(await sample(insert) * 1000)
            await asyncio.sleep(random.uniform(*IDLE_SECONDS))
    return latencies[WARM_SAMPLES:]


@asynccontextmanager
async def inserter(dsn: str, project: str) -> AsyncIterator[Callable[[], Awaitable[float]]]:
    """Another process that inserts one row a call; the call returns the time just before COMMIT."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    words = (sys.executable, "-m", "bench.inserter", dsn, str(project))
    process = await asyncio.create_subprocess_exec(*words, stdin=PIPE, stdout=PIPE, env=environment)
    assert process.stdin is not None
    assert process.stdout is not None
    pipe_in, pipe_out = process.stdin, process.stdout

    async def insert() -> float:
        pipe_in.write(b"insert\n")
        return float(await pipe_out.readline())

    try:
        yield insert
    finally:
        pipe_in.close()
        await process.wait()
