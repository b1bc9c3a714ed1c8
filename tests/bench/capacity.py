"""How far one database goes: a model of its processors, with the costs measured beside it. Arithmetic, no measurement."""

from __future__ import annotations

import math

from bench.crowd import Crowd
from bench.report import Report
from bench.row_cost import Cost

from daemon.wake import TURN_SECONDS

CORES = (2, 4, 8, 16)
USED = 0.7
"""The share of the processors that the queue may take: the rest is for reads, Realtime, vacuum and busy hours."""
IMAGE_SECONDS = (0.05, 0.1, 1.0)
BATCH = 4
VAIN_CLAIMS = 2 / TURN_SECONDS
"""What all workers together ask in vain at most, a second, as `daemon.wake` spreads them; none while all are busy."""
VOLUME_WRITES = 3_000
CONNECTIONS = 200
GPUS_EACH = (1, 8)


def rows_per_second(cores: float, image_seconds: float, gpus_each: int, cost: Cost, crowd: Crowd) -> float:
    """Rows a second that so many cores carry, with exactly as many workers as these rows need. Each worker hears each insert and
    beats, so the cost of a row grows with their number: a r² + b r = c."""
    budget_ms = 1000 * cores * USED
    workers = image_seconds / gpus_each  # for one row a second
    a = cost.listener_ms * workers
    b = cost.insert_ms + cost.row_ms[BATCH] + crowd.idle_ms * workers
    return (math.sqrt(b * b + 4 * a * budget_ms) - b) / (2 * a) if a > 0 else budget_ms / b


def tell_model(cost: Cost, crowd: Crowd, report: Report) -> None:
    """Print it."""
    report.note("")
    report.note(
        f"model, extrapolated from the costs above: {USED:.0%} of the database's cores for the queue, one insert a transaction,"
    )
    report.note(f"batches of {BATCH}, all GPUs busy")
    log_bytes = cost.insert_wal + cost.row_wal[BATCH]
    for gpus_each in GPUS_EACH:
        report.note(
            f"  {gpus_each} GPU(s) a worker" + "".join(f" {f'{seconds * 1000:.0f} ms an image':>24}" for seconds in IMAGE_SECONDS)
        )
        for cores in CORES:
            rates = [rows_per_second(cores, seconds, gpus_each, cost, crowd) for seconds in IMAGE_SECONDS]
            cells = [f"{rate:,.0f} rows/s {rate * seconds:,.0f} GPUs" for rate, seconds in zip(rates, IMAGE_SECONDS, strict=True)]
            log = f"{min(rates) * log_bytes / 1e6:.1f} to {max(rates) * log_bytes / 1e6:.1f} MB/s of log"
            report.note(f"  {f'{cores} cores':<15}" + "".join(f" {cell:>24}" for cell in cells) + f"   {log}")
    vain = f"{VAIN_CLAIMS:.0f} claims in vain a second"
    report.note(f"while some are idle: up to {vain} on top, {VAIN_CLAIMS * crowd.look_ms / 1000:.2f} cores")
    held = max(1.0, crowd.connections)
    report.note(f"connections: {held:.0f} a worker, so {CONNECTIONS} of them are {CONNECTIONS / held:.0f} workers")
    commits = 1 + 2 / BATCH
    few = VOLUME_WRITES / commits
    report.note(
        f"commits: {commits:.1f} a row; {VOLUME_WRITES:,} writes a second carry {few:,.0f} rows/s, more where commits share one"
    )
