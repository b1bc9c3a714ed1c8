"""Fairness: with 10,000 rows of one user pending, how many claims pass until another user's new row is taken.

First come, first served would take a thousand claims of 10. Rows without images, then all of one image, since rows of one
image are claimed together.
"""

from __future__ import annotations

import asyncio
import uuid
from typing import Any

import asyncpg
from bench.ground import INSERT, KIND, Ground, add_owner
from bench.report import Report

BACKLOG = 10_000
NEWCOMERS = 20
CLAIMS_MAX = 2

CLAIM = "select user_id from maskd.claim($1, $2, $3, $4)"


def run(ground: Ground, report: Report) -> None:
    """Count claims for several newcomers, one after the other; the unluckiest counts."""
    report.title("fairness", f"{BACKLOG:,} rows of one user pending, then one row of another; worst of {NEWCOMERS} newcomers")
    for images in (False, True):
        for most in (10, 1):
            claims = asyncio.run(measure(ground.database(), most, images))
            what = "all of one image" if images else "no images"
            report.at_most(f"claims of {most:>2} until it starts, {what}", [max(claims)], CLAIMS_MAX)


async def measure(dsn: str, most: int, images: bool) -> list[int]:
    """Claims that each newcomer waited for."""
    connection = await asyncpg.connect(dsn)
    await insert(connection, BACKLOG, images)
    waits = []
    for _ in range(NEWCOMERS):
        newcomer = await insert(connection, 1, images)
        waits.append(await claims_until(connection, newcomer, most))
    await connection.close()
    return waits


async def insert(connection: asyncpg.Connection[Any], rows: int, images: bool) -> str:
    """A new user with so many rows; their id."""
    user, project = await add_owner(connection)
    await connection.execute(INSERT, project, KIND, f"uploads/{user}/photo.jpg" if images else None, rows)
    return user


async def claims_until(connection: asyncpg.Connection[Any], user: str, most: int) -> int:
    """How many claims, the one that takes this user's row included."""
    for number in range(1, BACKLOG):
        rows = await connection.fetch(CLAIM, str(uuid.uuid4()), str(uuid.uuid4()), [KIND], most)
        if user in {row["user_id"] for row in rows}:
            return number
    raise AssertionError("the row was never claimed")
