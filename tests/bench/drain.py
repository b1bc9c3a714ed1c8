"""Drain: 20,000 rows of a no-op kind, by the production daemon, by a plain asyncpg loop, by pgqueuer and by procrastinate.

Every side runs alone on uvloop, is warm (it has just drained some rows) and finds all rows there, vacuumed and analysed. The
clock is the database's: from the start of the first row to the end of the last, as the rows (or the other queue's log) have it.
"""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Callable, Coroutine, Mapping
from typing import Any

import asyncpg
import uvloop
from bench import pgqueuer_side, plain, procrastinate_side
from bench.ground import KIND, Ground, fill
from bench.noop import Noop, settled, worker
from bench.report import Report, ratios

ROWS = 20_000
WARM_ROWS = 1_000
CLAIM = 100
ROUNDS = 5
SETTINGS = {
    "MASKD_CLAIM_MAX": str(CLAIM),
    "MASKD_BATCH_MAX": str(CLAIM),
    "MASKD_CPU_THREADS": "1",
    "MASKD_PREFETCH_BATCHES": "7",  # tasks of no length at all: what hides the database is more of them in flight
}

INTERVAL = """select extract(epoch from max(finished_at) - min(started_at))::float8, count(*) filter (where status = 'done')
  from public.segmentation_results"""
PAUSE = "update maskd.kinds set paused = $1 where kind = $2"


def run(ground: Ground, report: Report) -> None:
    """Measure in interleaved rounds."""
    report.title("drain", f"{ROWS:,} rows of a no-op kind, claims of {CLAIM}, one worker process, all warm")
    sides: Mapping[str, Callable[[], Coroutine[Any, Any, float]]] = {
        "maskd, production build()": lambda: ours(dsn),
        "plain asyncpg claim + complete, overlapped": lambda: theirs(dsn),
        pgqueuer_side.NAME: lambda: pgqueuer_side.rate(other, ROWS, WARM_ROWS),
        procrastinate_side.NAME: lambda: procrastinate_side.rate(third),
    }
    dsn, other, third = ground.database(), ground.empty_database(), ground.empty_database()
    asyncio.run(pgqueuer_side.install(other))
    asyncio.run(procrastinate_side.install(third))
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(ROUNDS):
        for name, side in sides.items():
            gc.collect()
            rates[name].append(uvloop.run(side()))
    tell(report, rates)


def tell(report: Report, rates: Mapping[str, list[float]]) -> None:
    """Print the rates and judge the ratios."""
    for name, values in rates.items():
        report.side(name, values, "jobs/s")
    mine, bare, pgqueuer, procrastinate = rates.values()
    report.at_least("maskd / plain", ratios(mine, bare), 0.8)
    report.at_least("maskd / pgqueuer", ratios(mine, pgqueuer), 1.5)
    report.note(f"maskd / procrastinate, no threshold: {ratios(mine, procrastinate)[0]:.0f}")


async def ours(dsn: str) -> float:
    """Jobs a second of the daemon: the kind is paused while rows are filled in, so that it starts warm and on all of them."""
    control = await asyncpg.connect(dsn)
    noop = Noop()
    async with worker(dsn, noop, **SETTINGS) as daemon:
        for rows in (WARM_ROWS, ROWS):
            await control.execute(PAUSE, True, KIND)
            await fill(control, rows)
            done = noop.expect(rows)
            await control.execute(PAUSE, False, KIND)
            await control.execute("notify maskd")
            await done.wait()
            await settled(daemon)
    return await rate_of(control, ROWS)


async def theirs(dsn: str) -> float:
    """Jobs a second of the plain loop."""
    control, claiming, completing = [await asyncpg.connect(dsn) for _ in range(3)]
    for rows in (WARM_ROWS, ROWS):
        await fill(control, rows)
        await plain.drain(claiming, completing, CLAIM)
    await asyncio.gather(claiming.close(), completing.close())
    return await rate_of(control, ROWS)


async def rate_of(control: asyncpg.Connection[Any], rows: int) -> float:
    """Jobs a second by the rows' own times; closes the connection."""
    seconds, done = await control.fetchrow(INTERVAL)
    await control.close()
    assert done == rows, f"{done} of {rows} rows are done"
    return rows / float(seconds)
