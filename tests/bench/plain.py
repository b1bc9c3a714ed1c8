"""What a queue costs at least: asyncpg loops on maskd's own table and index, with nothing of maskd around them.

No tokens, no validation, no lease, no metrics, no threads: the yardstick that maskd is held to.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import asyncpg
from bench.ground import KIND, SECONDS_MAX

CLAIM = f"""
update public.segmentation_results r
   set status = 'processing', started_at = clock_timestamp(), attempts = r.attempts + 1
  from (select p.id from public.segmentation_results p
         where p.kind = '{KIND}' and p.status = 'pending' and p.deaths = 0
         order by p.priority desc, p.fair_rank, p.id limit $1 for update skip locked) picked
 where r.id = picked.id
returning r.id, r.kind, r.project_id, r.user_id, r.source_image_url, r.text_prompt, r.params"""
COMPLETE = "update public.segmentation_results set status = 'done', finished_at = clock_timestamp() where id = any ($1)"


async def drain(claiming: asyncpg.Connection[Any], completing: asyncpg.Connection[Any], most: int) -> None:
    """Claim and complete until nothing is pending; the last claim is completed while the next is made."""
    rows = await claiming.fetch(CLAIM, most)
    while rows:
        rows, _ = await asyncio.gather(claiming.fetch(CLAIM, most), _complete(completing, rows))


class Listener:
    """LISTEN on one connection, claim and complete on another. `started_at` is when its last claim brought rows."""

    def __init__(self, connection: asyncpg.Connection[Any]) -> None:
        self.started_at = 0.0
        self.idle = asyncio.Event()
        self._connection = connection
        self._rung = asyncio.Event()

    def ring(self, *_: object) -> None:
        self._rung.set()

    async def run(self) -> None:
        """Claim up to ten rows whenever there may be some, for ever."""
        while True:
            await self._rung.wait()
            self._rung.clear()
            while rows := await self._connection.fetch(CLAIM, 10):
                self.started_at = time.perf_counter()
                await _complete(self._connection, rows)
                self.idle.set()


@asynccontextmanager
async def listener(dsn: str) -> AsyncIterator[Listener]:
    """A minimal worker in this event loop."""
    listening, working = await asyncpg.connect(dsn), await asyncpg.connect(dsn)
    loop = Listener(working)
    await listening.add_listener("maskd", loop.ring)
    task = asyncio.create_task(loop.run())
    try:
        async with asyncio.timeout(SECONDS_MAX):
            yield loop
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await asyncio.gather(listening.close(), working.close())


async def _complete(connection: asyncpg.Connection[Any], rows: Sequence[asyncpg.Record]) -> None:
    await connection.execute(COMPLETE, [row[0] for row in rows])
