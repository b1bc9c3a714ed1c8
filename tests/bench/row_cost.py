"""What one row costs the database: processor time, write-ahead log, bytes over the wire, time by function.

Inserts are those of users with their tokens, one a transaction, as the Edge makes them, without and with listening workers.
Claims and settles are those of one daemon whose device takes no time, by TCP, in batches as GPUs have them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

import asyncpg
from bench.drain import PAUSE
from bench.fleet import fleet, pause, until_done
from bench.gauges import Gauge, Reading, wire
from bench.ground import KIND, Ground, fill
from bench.report import Report
from support.people import Person, as_user, person

ROWS = 2_000
BATCHES = (1, 4, 16)
USERS = 20
INSERTS = 600
LISTENERS = 50
CREDITS = 100_000
ADD = f"insert into public.segmentation_results (project_id, kind) values ($1::text::uuid, '{KIND}')"
FEW_FUNCTIONS = 8


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of the server's processors, and bytes of log, for one row."""

    insert_ms: float
    listener_ms: float
    """More for each worker that listens."""
    insert_wal: float
    row_ms: dict[int, float]
    """Claimed and settled, by the batch of the device."""
    row_wal: dict[int, float]


def measure(ground: Ground, report: Report) -> Cost:
    """Measure and tell."""
    report.note("")
    report.note(f"one row, on the server's side ({INSERTS} inserts, {ROWS:,} rows by a daemon whose device takes no time):")
    alone, log_bytes = asyncio.run(inserts(ground.database(), ground, 0))
    heard, _ = asyncio.run(inserts(ground.database(), ground, LISTENERS))
    report.side("insert by a user, nobody listens", [alone], "ms of processor")
    report.side(f"the same, {LISTENERS} connections listen", [heard], "ms of processor")
    report.side("insert, write-ahead log", [log_bytes], "bytes")
    row_ms, row_wal = {}, {}
    for batch in BATCHES:
        row_ms[batch], row_wal[batch] = asyncio.run(drained(ground.database(), ground, batch, report))
    return Cost(alone, max(0.0, heard - alone) / LISTENERS, log_bytes, row_ms, row_wal)


async def inserts(dsn: str, ground: Ground, listeners: int) -> tuple[float, float]:
    """Processor milliseconds and log bytes of one insert of its own transaction, as fast as one client goes."""
    async with AsyncExitStack() as stack:
        control = await connected(stack, dsn)
        people = [await person(control, CREDITS) for _ in range(USERS)]
        for _ in range(listeners):
            await (await connected(stack, dsn)).add_listener("maskd", lambda *_: None)
        gauge = Gauge(control, ground.server.pid or 0)
        await add(control, people, INSERTS // 4)
        before = await gauge.read()
        await add(control, people, INSERTS)
        await pause(0.2)  # what listens hears a little later
        return per_row(before, await gauge.read(), INSERTS)


async def add(control: asyncpg.Connection[Any], people: Sequence[Person], rows: int) -> None:
    """So many rows, one after the other, users taking turns."""
    for number in range(rows):
        who = people[number % len(people)]
        await as_user(control, who.id, ADD, who.project)


async def connected(stack: AsyncExitStack, dsn: str) -> asyncpg.Connection[Any]:
    connection = await asyncpg.connect(dsn)
    stack.push_async_callback(connection.close)
    return connection


async def drained(dsn: str, ground: Ground, batch: int, report: Report) -> tuple[float, float]:
    """The same of a row that is claimed and settled in batches of `batch`."""
    name = dsn.partition("?")[0].rpartition("/")[2]
    await ground.execute(f"alter database {name} set track_functions = 'all'")
    async with AsyncExitStack() as stack:
        control = await connected(stack, dsn)
        gauge = Gauge(control, ground.server.pid or 0)
        await control.execute(PAUSE, True, KIND)
        await fill(control, ROWS)
        way, port = stack.enter_context(wire("127.0.0.1", ground.server.port))
        by_tcp = f"postgresql://postgres:{ground.server.password}@127.0.0.1:{port}/{name}"
        await control.execute("checkpoint")
        with fleet(by_tcp, 1, 0.0, batch) as daemons:
            daemons.mark()
            before, sent = await gauge.read(), way.bytes
            await control.execute(PAUSE, False, KIND)
            await control.execute("notify maskd")
            await until_done(control, ROWS)
            after, sent, did = await gauge.read(), way.bytes - sent, daemons.mark()
            daemons.stop()
        milli, log_bytes = per_row(before, after, ROWS)
        calls = f"{ROWS / did.calls['claim']:.0f} rows a claim, {ROWS / did.calls['settle']:.0f} a settle"
        client = did.cpu_seconds * 1000 / ROWS
        report.side(f"claim and settle, batches of {batch} ({calls})", [milli], "ms of processor")
        report.note(f"    daemon {client:.2f} ms; log {log_bytes:,.0f} bytes; {sent / ROWS:,.0f} bytes over the wire")
        if batch == BATCHES[1]:
            await tell_functions(control, gauge, report)
    return milli, log_bytes


async def tell_functions(control: asyncpg.Connection[Any], gauge: Gauge, report: Report) -> None:
    """The dearest functions, by the clock of the server, the time of its own statements in them included."""
    rows = [row for row in await gauge.functions() if row["name"].startswith("maskd.")][:FEW_FUNCTIONS]
    shares = [f"{row['name'].removeprefix('maskd.')} {row['self_ms'] * 1000 / ROWS:.0f}" for row in rows]
    report.note(f"    by function, microseconds a row: {', '.join(shares)}")


def per_row(before: Reading, after: Reading, rows: int) -> tuple[float, float]:
    return after.cpu_since(before) * 1000 / rows, (after.wal_bytes - before.wal_bytes) / rows
