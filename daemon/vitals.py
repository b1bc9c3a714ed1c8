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
MEMORY_SECONDS = 5.0
Memory = Callable[[], Mapping[str, int]]


class GpuMemory:
    """Bytes of each GPU by state, as of the last look: the one reader, for metrics, /health and beats. It looks on threads, since
    torch's allocator keeps everybody waiting while its device does."""

    def __init__(self) -> None:
        self._readers: Mapping[str, Memory] = {}
        self._being_read: set[str] = set()
        self.known: dict[str, Mapping[str, int]] = {}

    async def open(self, readers: Mapping[str, Memory]) -> None:
        """By name how the memory of each device is read."""
        self._readers = readers
        await self.look()

    async def look(self) -> None:
        """Ask every device; what does not answer is not known."""
        async with anyio.create_task_group() as tasks:
            for name in self._readers.keys() - self._being_read:  # one that hangs costs a thread, not one a look
                tasks.start_soon(self._look_at, name)

    async def run(self) -> None:
        """Look now and then, for ever."""
        while True:
            await anyio.sleep(MEMORY_SECONDS)
            await self.look()

    async def _look_at(self, name: str) -> None:
        reason = "no answer"
        with anyio.move_on_after(ANSWER_SECONDS):
            try:
                self.known[name] = await anyio.to_thread.run_sync(self._read, name, abandon_on_cancel=True)
                return
            except RuntimeError as error:  # torch's, of a device that is lost: whoever computes there says what becomes of that
                reason = str(error)
        self.known.pop(name, None)
        log.warning("vitals.memory_unknown", device=name, reason=reason)

    def _read(self, name: str) -> Mapping[str, int]:
        self._being_read.add(name)
        try:
            return self._readers[name]()
        finally:
            self._being_read.discard(name)


class Vitals:
    """Looks when scraped, at most every `every_seconds`."""

    def __init__(self, store: TaskStore, memory: GpuMemory, every_seconds: float) -> None:
        self._store = store
        self._memory = memory
        self._every_seconds = every_seconds
        self._looked_at = -math.inf
        self._turn = anyio.Lock()
        self._open = False

    def open(self) -> None:
        """The store is open."""
        self._open = True

    async def look(self) -> None:
        """Bring the series up to date unless they are young enough."""
        async with self._turn:
            if not self._open or time.monotonic() - self._looked_at < self._every_seconds:
                return
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._look_at_queue)
                tasks.start_soon(self._memory.look)
            metrics.show_memory(self._memory.known)
            self._looked_at = time.monotonic()

    async def _look_at_queue(self) -> None:
        try:
            with anyio.fail_after(ANSWER_SECONDS):
                metrics.show_queue(await self._store.status())
        except (*AWAY, RefusedError, TimeoutError) as error:
            log.info("vitals.queue_unknown", reason=str(error) or type(error).__name__)
            metrics.hide_queue()
