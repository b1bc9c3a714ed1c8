"""The other side of pick-up, a process of its own as the Edge is: inserts a row for each line it reads.

Arguments: a DSN and a project. Prints, for each row, time.perf_counter() from just before COMMIT (one clock for all processes).
"""

from __future__ import annotations

import asyncio
import sys
import time

import asyncpg
from bench.ground import KIND

INSERT = "insert into public.segmentation_results (project_id, kind) values ($1, $2)"


async def serve(dsn: str, project: str) -> None:
    """Insert until the input ends."""
    connection = await asyncpg.connect(dsn)
    while await asyncio.to_thread(sys.stdin.readline):
        transaction = connection.transaction()
        await transaction.start()
        await connection.execute(INSERT, project, KIND)
        before = time.perf_counter()
        await transaction.commit()
        print(before, flush=True)
    await connection.close()


if __name__ == "__main__":
    asyncio.run(serve(*sys.argv[1:]))
