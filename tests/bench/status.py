"""The operator's view at scale: `maskd.status()`, which `maskd watch` asks every two seconds, and one batch of `maskd prune`,
with a million tasks that are over and a hundred thousand that wait."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

import asyncpg
from bench.claim_scale import fill
from bench.ground import KIND, Ground
from bench.report import Report

OVER = 1_000_000
WAITING = 100_000
ROUNDS = 15
STATUS_MS_MAX = 500.0
PRUNE_MS_MAX = 500.0
INSERT_OVER = """
insert into public.segmentation_results (project_id, user_id, kind, status, created_at, started_at, finished_at)
  select p.id, p.user_id, $1, (array['done', 'done', 'done', 'error'])[n % 4 + 1], now() - make_interval(secs => n + 5),
         now() - make_interval(secs => n + 2), now() - make_interval(secs => n)
    from generate_series(1, $2::integer) n, (select * from public.projects limit 1) p"""


def run(ground: Ground, report: Report) -> None:
    """Measure both."""
    report.title("status", f"the operator's view with {OVER:,} tasks that are over and {WAITING:,} that wait")
    status, prune = asyncio.run(measure(ground.database()))
    report.side("maskd.status()", status, "ms")
    report.side("maskd.prune(…, 500)", prune, "ms")
    report.at_most("median of maskd.status(), ms", [statistics.median(status)], STATUS_MS_MAX)
    report.at_most("median of a batch of prune, ms", [statistics.median(prune)], PRUNE_MS_MAX)


async def measure(dsn: str) -> tuple[list[float], list[float]]:
    """The times of each call in ms."""
    sql = await asyncpg.connect(dsn)
    await fill(sql, {KIND: WAITING})
    await sql.execute("set session_replication_role = replica")
    await sql.execute(INSERT_OVER, KIND, OVER)
    await sql.execute("reset session_replication_role")
    await sql.execute("vacuum analyze public.segmentation_results")
    status = [await timed(sql, "select maskd.status()") for _ in range(ROUNDS)]
    prune = [await timed(sql, "select maskd.prune('done', now() - interval '1 day', null, 500)") for _ in range(ROUNDS)]
    await sql.close()
    return status, prune


async def timed(sql: asyncpg.Connection[Any], query: str) -> float:
    started = time.perf_counter()
    await sql.fetch(query)
    return (time.perf_counter() - started) * 1000
