"""What /metrics tells that must be asked for first: the queue, of the database, and the memory of GPUs.

Enters: a scrape. Leaves: series that are at most so old. Never fails a scrape, and holds none up for long: what does not
answer is missing from it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import anyio
import anyio.to_thread
import structlog

from daemon import metrics
from daemon.gate import AWAY
from storage.base import RefusedError, TaskStore

log = structlog.get_logger(__name__)

ANSWER_SECONDS = 3.0
"""A scrape is given ten seconds by Prometheus."""
Memory = Callable[[], Mapping[str, int]]


class Vitals:
    """Looks when scraped, at most every `every_seconds`. `memory` holds by device how its memory is read."""

    def __init__(self, store: TaskStore, every_seconds: float) -> None:
        self._store = store
        self._every_seconds = every_seconds
        self._looked_at = -math.inf
        self._turn = anyio.Lock()
        self._being_read: set[str] = set()
        self._open = False
        self._memory: Mapping[str, Memory] = {}

    def open(self, memory: Mapping[str, Memory]) -> None:
        """The store is open, and these are the devices."""
        self._memory, self._open = memory, True

    async def look(self) -> None:
        """Bring the series up to date unless they are young enough."""
        async with self._turn:
            if not self._open or time.monotonic() - self._looked_at < self._every_seconds:
                return
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._look_at_queue)
                tasks.start_soon(self._look_at_memory)
            self._looked_at = time.monotonic()

    async def _look_at_queue(self) -> None:
        try:
            with anyio.fail_after(ANSWER_SECONDS):
                metrics.show_queue(await self._store.status())
        except (*AWAY, RefusedError, TimeoutError) as error:
            log.info("vitals.queue_unknown", reason=str(error) or type(error).__name__)
            metrics.hide_queue()

    async def _look_at_memory(self) -> None:
        for device in self._memory.keys() - self._being_read:  # one that hangs costs a thread, not one a scrape
            with anyio.move_on_after(ANSWER_SECONDS) as limit:
                found = await anyio.to_thread.run_sync(self._memory_of, device, abandon_on_cancel=True)
                for state, count in found.items():
                    metrics.GPU_MEMORY.labels(device, state).set(count)
            if limit.cancelled_caught:
                log.warning("vitals.memory_unknown", device=device)

    def _memory_of(self, device: str) -> Mapping[str, int]:
        self._being_read.add(device)
        try:
            return self._memory[device]()
        finally:
            self._being_read.discard(device)
