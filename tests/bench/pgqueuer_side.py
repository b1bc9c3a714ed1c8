"""pgqueuer at its best: a pool of asyncpg connections, large batches, uvloop as its own command runs it, its log unlogged
(`balanced`, the fastest of its settings that loses no job in a crash), on its own tables in the same server.

The entrypoint of the measured jobs is registered only when all are there, as a paused kind is in maskd.
"""

from __future__ import annotations

import asyncio
from datetime import timedelta

import asyncpg
from bench.ground import SECONDS_MAX
from pgqueuer.adapters.persistence.qb import QueryBuilderEnvironment
from pgqueuer.core.qm import QueueManager
from pgqueuer.db import AsyncpgDriver, AsyncpgPoolDriver
from pgqueuer.domain.settings import DBSettings, Durability
from pgqueuer.models import Job
from pgqueuer.queries import Queries

NAME = "pgqueuer, batches of 500, pool, uvloop"
BATCH = 500
CONNECTIONS = 4  # it listens on one of them
POLL = timedelta(seconds=0.1)

INTERVAL = """select extract(epoch from max(created) filter (where status = 'successful')
    - min(created) filter (where status = 'picked'))::float8, count(*) filter (where status = 'successful')
  from pgqueuer_log where entrypoint = 'measured'"""


async def install(dsn: str) -> None:
    """Its tables, in a database of its own."""
    connection = await asyncpg.connect(dsn)
    tables = QueryBuilderEnvironment(DBSettings(durability=Durability.balanced))
    await Queries(AsyncpgDriver(connection), qbe=tables).install()
    await connection.close()


async def rate(dsn: str, jobs: int, warm_jobs: int) -> float:
    """Jobs a second, from its first pick to its last success by its own log."""
    control, working = await asyncpg.connect(dsn), await asyncpg.create_pool(dsn, min_size=CONNECTIONS, max_size=CONNECTIONS)
    await control.execute("truncate pgqueuer, pgqueuer_log, pgqueuer_statistics")
    manager = QueueManager(Queries(AsyncpgPoolDriver(working)))
    async with asyncio.timeout(SECONDS_MAX), asyncio.TaskGroup() as tasks:
        tasks.create_task(manager.run(batch_size=BATCH, dequeue_timeout=POLL))
        await _drain(control, manager, "warm", warm_jobs)
        await _drain(control, manager, "measured", jobs)
        manager.shutdown.set()
    working.terminate()
    seconds, done = await control.fetchrow(INTERVAL)
    await control.close()
    assert done == jobs, f"{done} of {jobs} jobs succeeded"
    return jobs / float(seconds)


async def _drain(control: asyncpg.Connection, manager: QueueManager, name: str, jobs: int) -> None:
    await Queries(AsyncpgDriver(control)).enqueue([name] * jobs, [None] * jobs, [0] * jobs)
    await control.execute("vacuum analyze pgqueuer")
    left, done = jobs, asyncio.Event()

    async def work(_: Job) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            done.set()

    manager.entrypoint(name)(work)
    await done.wait()
