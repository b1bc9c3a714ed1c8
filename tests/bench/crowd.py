"""Fifty workers on one database: claims in a backlog, pick-up at rest and at half load, and what they cost while nothing waits.

Production daemons with simulated GPUs, 25 in a process. Each part is measured twice: as it is, and with all workers looking at
once whenever a hint comes.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import asyncpg
from bench.drain import PAUSE
from bench.fleet import Did, Fleet, fleet, pause, until_done
from bench.gauges import Gauge
from bench.ground import INSERT, KIND, Ground, add_owner
from bench.report import Report, percentile

WORKERS = 50
PROCESSES = 2
IMAGE_SECONDS = 0.2
BATCH = 4
IDLE_SECONDS = 20.0
RESTS = 40
REST_SECONDS = 0.2
LOAD_SECONDS = 10.0
LOAD_SHARE = 0.5
STREAMS = 8
BACKLOG = 2_500
CLAIMS_RATIO_MAX = 0.5

WAITS = """select extract(epoch from started_at - pending_at)::float8 * 1000 as until_claimed,
  extract(epoch from finished_at - pending_at)::float8 * 1000 as until_done
  from public.segmentation_results where status = 'done' order by pending_at"""


@dataclass(frozen=True, slots=True)
class Crowd:
    """What a worker costs that has nothing to do."""

    idle_ms: float
    """Milliseconds of the server's processors a second."""
    calls: float
    """Calls a second."""
    connections: float
    look_ms: float
    """All that one look at an empty queue costs the server: being told of the row that another took, and the claim."""


@dataclass(slots=True)
class Scene:
    """A fleet at work on a database, and who looks at it."""

    dsn: str
    control: asyncpg.Connection[Any]
    gauge: Gauge
    daemons: Fleet
    project: str


def measure(ground: Ground, report: Report) -> Crowd:
    """Measure and tell; what an idle worker costs."""
    capacity = WORKERS / IMAGE_SECONDS
    report.note("")
    report.note(
        f"{WORKERS} daemons in {PROCESSES} processes, {IMAGE_SECONDS * 1000:.0f} ms an image: at most {capacity:.0f} rows/s"
    )
    _, at_once = asyncio.run(visit(ground.database(), ground, report, turns=False))
    crowd, in_turns = asyncio.run(visit(ground.database(), ground, report, turns=True))
    report.at_most("half load, claims a row: in turns / at once", [in_turns / at_once], CLAIMS_RATIO_MAX)
    assert crowd is not None
    return crowd


async def visit(dsn: str, ground: Ground, report: Report, turns: bool) -> tuple[Crowd | None, float]:
    """One fleet from its start to its end; claims a row at half load."""
    report.note("in turns, as they are:" if turns else "all at once when a hint comes (for comparison):")
    control = await asyncpg.connect(dsn)
    _, project = await add_owner(control)
    crowd = None
    with fleet(dsn, WORKERS, IMAGE_SECONDS, BATCH, processes=PROCESSES, turns=turns) as daemons:
        scene = Scene(dsn, control, Gauge(control, ground.server.pid or 0), daemons, project)
        await pause(12.0)  # until each has counted its neighbours
        if turns:
            crowd = await idle(scene, report)
        else:
            await at_rest(scene, report)
        looks = await at_half_load(scene, report)
        await in_backlog(scene, report)
        daemons.stop()
    await control.close()
    return crowd, looks


async def idle(scene: Scene, report: Report) -> Crowd:
    """Nothing waits, nothing comes: beats, rescues, looks for blobs to delete, polls. Then a row now and then."""
    scene.daemons.mark()
    before, began = await scene.gauge.read(), time.monotonic()
    await pause(IDLE_SECONDS)
    did, after, seconds = scene.daemons.mark(), await scene.gauge.read(), time.monotonic() - began
    calls = did.calls.total() / seconds / WORKERS
    milli = after.cpu_since(before) * 1000 / seconds / WORKERS
    held = await scene.gauge.connections() / WORKERS
    report.side("idle: calls of one worker", [calls], f"a second; {held:.0f} connections each")
    each = ", ".join(f"{name} {count / seconds / WORKERS:.2f}" for name, count in did.calls.most_common())
    report.note(f"    {each}; and a NOTIFY to itself every ten seconds")
    report.side(
        "idle: one worker",
        [milli],
        f"ms of the server's processors a second; log {wal(before, after) / seconds / WORKERS:.0f} bytes",
    )
    return Crowd(milli, calls, held, await at_rest(scene, report))


async def at_rest(scene: Scene, report: Report) -> float:
    """One row now and then for fifty idle workers; what a look costs."""
    await emptied(scene)
    before = await scene.gauge.read()
    for _ in range(RESTS):
        await scene.control.execute(INSERT, scene.project, KIND, None, 1)
        await pause(REST_SECONDS * random.uniform(0.8, 1.2))
    await until_done(scene.control, RESTS)
    after = await scene.gauge.read()
    did = scene.daemons.mark()
    await tell("at rest", scene, report, did, RESTS, after.cpu_since(before))
    return after.cpu_since(before) * 1000 / max(1, did.calls["empty claim"])


async def at_half_load(scene: Scene, report: Report) -> float:
    """Rows at random moments, one a transaction, half as many as the devices could do; claims a row."""
    await emptied(scene)
    before, began = await scene.gauge.read(), time.monotonic()
    rows = sum(await asyncio.gather(*(stream(scene, began + LOAD_SECONDS) for _ in range(STREAMS))))
    rate = rows / (time.monotonic() - began)
    await until_done(scene.control, rows)
    after = await scene.gauge.read()
    return await tell(f"{rate:.0f} rows/s", scene, report, scene.daemons.mark(), rows, after.cpu_since(before))


async def stream(scene: Scene, until: float) -> int:
    """One of those who insert, on a connection of its own; how many rows. Those that are late are inserted all the same."""
    connection = await asyncpg.connect(scene.dsn)
    rows, due = 0, time.monotonic()
    while (due := due + random.expovariate(LOAD_SHARE * WORKERS / IMAGE_SECONDS / STREAMS)) < until:
        if due > time.monotonic():
            await pause(due - time.monotonic())
        await connection.execute(INSERT, scene.project, KIND, None, 1)
        rows += 1
    await connection.close()
    return rows


async def in_backlog(scene: Scene, report: Report) -> None:
    """All rows there, every device busy."""
    await scene.control.execute(PAUSE, True, KIND)
    await emptied(scene)
    await scene.control.execute(INSERT, scene.project, KIND, None, BACKLOG)
    await pause(1.0)  # until nobody looks any more
    scene.daemons.mark()
    before, began = await scene.gauge.read(), time.monotonic()
    await scene.control.execute(PAUSE, False, KIND)
    await scene.control.execute("notify maskd")
    await until_done(scene.control, BACKLOG)
    did, after, seconds = scene.daemons.mark(), await scene.gauge.read(), time.monotonic() - began
    claims = did.claims_ms
    report.side("backlog: claim that brings rows, p50", [percentile(claims, 50)], f"ms; p99 {percentile(claims, 99):.1f}")
    busy = f"processors in use: daemons {did.cpu_seconds / seconds:.2f}, database {after.cpu_since(before) / seconds:.2f}"
    by_worker = await scene.control.fetch("select count(*) as rows from public.segmentation_results group by worker_id")
    shares = [row["rows"] for row in by_worker]
    report.note(f"    {busy}; rows of a worker {min(shares)} to {max(shares)}, mean {statistics.mean(shares):.0f}")
    once = await scene.control.fetchval("select count(*) from public.segmentation_results where status = 'done' and attempts = 1")
    assert (once, sum(did.images)) == (BACKLOG, BACKLOG), f"{BACKLOG} rows: {once} done once, {sum(did.images)} on devices"


async def tell(name: str, scene: Scene, report: Report, did: Did, rows: int, cpu_seconds: float) -> float:
    """Pick-up by the database's clock, claims a row, and what a row cost all in all. Returns claims a row."""
    waits = await scene.control.fetch(WAITS)
    until_claimed, until_done = ([float(row[column]) for row in waits] for column in (0, 1))
    report.side(f"{name}: from insert to claim, p50", [percentile(until_claimed, 50)], f"ms; {tail(until_claimed)}")
    report.side(f"{name}: from insert to done, p50", [percentile(until_done, 50)], f"ms; {tail(until_done)}")
    looks = (did.calls["claim"] + did.calls["empty claim"]) / rows
    server, client = cpu_seconds * 1000 / rows, did.cpu_seconds * 1000 / rows
    report.note(f"    {looks:.1f} claims a row; {server:.1f} ms of the server's processors a row, {client:.1f} of the daemons'")
    return looks


async def emptied(scene: Scene) -> None:
    """No rows, and counting begins."""
    await scene.control.execute("truncate public.segmentation_results")
    scene.daemons.mark()


def tail(values: Sequence[float]) -> str:
    return f"p99 {percentile(values, 99):.1f}, worst {max(values):.1f}"


def wal(before: Any, after: Any) -> float:
    return float(after.wal_bytes - before.wal_bytes)
