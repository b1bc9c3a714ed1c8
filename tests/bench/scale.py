"""Scale out: 1 to 8 daemon processes with a simulated GPU each, then 50, on one Postgres; and how far one database goes.

The server syncs and logs as one in production does (its disk is this host's). Devices sleep, so that what is shared, the
database, is measured and not the processors of this host: their load is printed beside each figure.
"""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from dataclasses import dataclass

import asyncpg
from bench import crowd, row_cost
from bench.capacity import tell_model
from bench.drain import PAUSE
from bench.fleet import Did, fleet, until_done
from bench.gauges import Gauge
from bench.ground import KIND, Ground, fill
from bench.ground import ground as make_ground
from bench.report import Report, ratios

SERVER = {"fsync": "on", "full_page_writes": "on", "wal_level": "logical", "max_connections": "500", "shared_buffers": "256MB"}
DAEMONS = (1, 2, 4, 8)
ROUNDS = 3
IMAGE_SECONDS = 0.02
BATCH = 4
ROWS_EACH = 250
LEAST = 0.95

# While there is work: from each daemon's first settle to the last claim of all. What one settle wrote counts from its time on.
STEADY = """
with dry as (select max(started_at) as at from public.segmentation_results),
ends as (select worker_id, finished_at, min(finished_at) over (partition by worker_id) as first
           from public.segmentation_results, dry where finished_at <= dry.at)
select count(*) filter (where finished_at > first + interval '5 ms')
    / extract(epoch from max(finished_at) - min(first))::float8 as rate
  from ends group by worker_id"""
ENDS = """select count(*) filter (where status = 'done' and attempts = 1) as once,
  extract(epoch from max(finished_at) - min(started_at))::float8 as seconds from public.segmentation_results"""


@dataclass(frozen=True, slots=True)
class Round:
    """One drain by some daemons."""

    rates: list[float]
    """Rows a second of each daemon while there was work."""
    whole: float
    """Rows a second of all, start and end included."""
    client_cores: float
    server_cores: float


def run(ground: Ground, report: Report) -> None:
    """Measure on a server of its own."""
    report.title("scale", f"daemon processes with a simulated GPU, {IMAGE_SECONDS * 1000:.0f} ms an image, batches of {BATCH}")
    report.note(
        f"{os.cpu_count()} cores for the daemons, the database and whoever inserts, load {os.getloadavg()[0]:.1f} at the start"
    )
    with make_ground(SERVER) as own:
        throughput(own, report)
        cost = row_cost.measure(own, report)
        crowded = crowd.measure(own, report)
    tell_model(cost, crowded, report)


def throughput(ground: Ground, report: Report) -> None:
    """N daemons against N times one, in interleaved rounds."""
    dsn, found = ground.database(), {count: list[Round]() for count in DAEMONS}
    for _ in range(ROUNDS):
        for count, rounds in found.items():
            rounds.append(asyncio.run(drain(dsn, count, ground)))
    ideal = [sum(each.rates) for each in found[1]]
    for count, rounds in found.items():
        report.side(f"{count} daemon(s), while there is work", [sum(each.rates) for each in rounds], "rows/s")
        cores = [statistics.median(each) for each in zip(*((one.client_cores, one.server_cores) for one in rounds), strict=True)]
        whole = statistics.median(each.whole for each in rounds)
        report.note(f"  whole run {whole:.0f} rows/s; processors in use: daemons {cores[0]:.2f}, database {cores[1]:.2f}")
    for count, rounds in list(found.items())[1:]:
        shares = [rate / count for rate in ratios([sum(each.rates) for each in rounds], ideal)]
        report.at_least(f"{count} daemons / {count} x one daemon", shares, LEAST)
    least = [min(each.rates) / statistics.mean(each.rates) for each in found[DAEMONS[-1]]]
    report.at_least(f"slowest of {DAEMONS[-1]} daemons / their mean", least, 0.9)


async def drain(dsn: str, count: int, ground: Ground) -> Round:
    """`count` daemons find all rows there; each row is done once, by one of them."""
    control = await asyncpg.connect(dsn)
    gauge = Gauge(control, ground.server.pid or 0)
    rows = ROWS_EACH * count
    await control.execute(PAUSE, True, KIND)
    await fill(control, rows)
    with fleet(dsn, count, IMAGE_SECONDS, BATCH) as daemons:
        daemons.mark()
        before, began = await gauge.read(), time.monotonic()
        await control.execute(PAUSE, False, KIND)
        await control.execute("notify maskd")
        await until_done(control, rows)
        did, after, seconds = daemons.mark(), await gauge.read(), time.monotonic() - began
        daemons.stop()
    once, whole = await control.fetchrow(ENDS)
    check_once(did, once, rows)
    rates = [float(row[0]) for row in await control.fetch(STEADY)]
    await control.close()
    assert len(rates) == count, f"only {len(rates)} of {count} daemons got work"
    return Round(rates, rows / whole, did.cpu_seconds / seconds, after.cpu_since(before) / seconds)


def check_once(did: Did, once: int, rows: int) -> None:
    """Every row was claimed once, and every one met a device once."""
    assert once == rows, f"{once} of {rows} rows were done with one claim"
    assert sum(did.images) == rows, f"{rows} rows, and {sum(did.images)} images on devices"
