"""Memory: the resident size of a daemon process from row 2,000 to row 20,000. It must stay flat."""

from __future__ import annotations

import asyncio
import os
import tempfile
from pathlib import Path

import asyncpg
from bench.ground import Ground, fill
from bench.noop import settings
from bench.report import Report
from support.daemons import ROOT, DaemonProcess, running, wait_until

ROWS = 20_000
MB = 1024 * 1024


def run(ground: Ground, report: Report) -> None:
    """Drain in a process that weighs itself."""
    report.title("memory", f"resident memory of a daemon process while it drains {ROWS:,} rows of a no-op kind")
    dsn = ground.database()
    asyncio.run(prepare(dsn))
    with tempfile.TemporaryDirectory() as folder:
        more = {"MASKD_LOG_LEVEL": "info", "MASKD_LOG_FORMAT": "json"}
        values = {**os.environ, "PYTHONPATH": str(ROOT / "tests"), **settings(dsn, folder, **more)}
        with running(values, Path(folder), ("-m", "bench.worker")) as daemon:
            wait_until(f"{ROWS} rows", lambda: weights(daemon)[-1:] >= [(ROWS, 0)])
            found = weights(daemon)
    (first_rows, first), *later = found
    (last_rows, last) = later[-1]
    report.side(f"at row {first_rows:,}", [first / MB], "MiB")
    report.side(f"at row {last_rows:,}", [last / MB], "MiB")
    report.at_most("highest since / first", [max(rss for _, rss in later) / first], 1.1)
    report.at_least("lowest since / first", [min(rss for _, rss in later) / first], 0.9)


def weights(daemon: DaemonProcess) -> list[tuple[int, int]]:
    """(rows, bytes) as the process has printed them so far."""
    return [(int(line["rows"]), int(line["rss"])) for line in daemon.events("memory")]


async def prepare(dsn: str) -> None:
    connection = await asyncpg.connect(dsn)
    await fill(connection, ROWS)
    await connection.close()
