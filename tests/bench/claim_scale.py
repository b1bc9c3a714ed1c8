"""Claim at scale: one `maskd.claim` of 10 with 1,000 pending rows against the same with a million.

A million of the kind that is claimed, then a million of a kind that this worker does not serve. Each claim is rolled back, so
that every one meets the same queue. Rows name images, so that looking for rows of the same image is part of it.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from typing import Any

import asyncpg
from bench.ground import KIND, OTHER_KIND, Ground, add_owner
from bench.report import Report, ratios

FEW = 1_000
MANY = 1_000_000
USERS = 500
ROUNDS = 10
CLAIMS = 40
MOST = 10
RATIO_MAX = 1.5

CLAIM = "select * from maskd.claim($1, $2, $3, $4)"
# Past the triggers, which would take minutes for a million rows: each column as they would set it.
INSERT = f"""
insert into public.segmentation_results
    (project_id, user_id, kind, source_image_url, priority, status, fair_rank, pending_at)
  select $1, ('00000000-0000-4000-8000-' || lpad((n % {USERS})::text, 12, '0'))::uuid, $2,
      'uploads/' || n % {USERS} || '/' || n || '.jpg', 0, 'pending', extract(epoch from now()) + n / {USERS}, clock_timestamp()
    from generate_series(1, $3::integer) n"""


def run(ground: Ground, report: Report) -> None:
    """Measure the three cases in interleaved rounds."""
    report.title("claim_scale", f"one maskd.claim of {MOST}, {ROUNDS} rounds of {CLAIMS} rolled-back claims each")
    few, many = asyncio.run(measure(ground.database(), ground.database()))
    report.side(f"{FEW:,} pending", few[KIND], "ms")
    report.side(f"{MANY:,} pending", many[KIND], "ms")
    report.side(f"{FEW:,} pending beside {MANY:,} not served", many[OTHER_KIND], "ms")
    report.at_most(f"{MANY:,} / {FEW:,} pending", ratios(many[KIND], few[KIND]), RATIO_MAX)
    report.at_most("not served / without them", ratios(many[OTHER_KIND], few[KIND]), RATIO_MAX)


async def measure(small: str, large: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """Per database and kind the median of each round in ms."""
    few, many = await asyncpg.connect(small), await asyncpg.connect(large)
    await fill(few, {KIND: FEW})
    await fill(many, {KIND: MANY, OTHER_KIND: FEW})
    found: tuple[dict[str, list[float]], dict[str, list[float]]] = {KIND: []}, {KIND: [], OTHER_KIND: []}
    for _ in range(ROUNDS):
        for connection, medians in ((few, found[0]), (many, found[1])):
            for kind, rounds in medians.items():
                rounds.append(statistics.median([await claim_ms(connection, kind) for _ in range(CLAIMS)]))
    await asyncio.gather(few.close(), many.close())
    return found


async def fill(connection: asyncpg.Connection[Any], rows: dict[str, int]) -> None:
    """So many pending rows per kind, of many users, vacuumed and analysed."""
    _, project = await add_owner(connection)
    await connection.execute("set session_replication_role = replica")
    for kind, count in rows.items():
        await connection.execute(INSERT, project, kind, count)
    await connection.execute("reset session_replication_role")
    await connection.execute("vacuum analyze public.segmentation_results")


async def claim_ms(connection: asyncpg.Connection[Any], kind: str) -> float:
    """The time of one claim, which is undone."""
    transaction = connection.transaction()
    await transaction.start()
    started = time.perf_counter()
    rows = await connection.fetch(CLAIM, str(uuid.uuid4()), str(uuid.uuid4()), [kind], MOST)
    seconds = time.perf_counter() - started
    await transaction.rollback()
    assert len(rows) == MOST, f"{len(rows)} rows instead of {MOST}"
    return seconds * 1000
