"""Lease, beside the flow: beats say that this worker lives and what it holds; rescues take back what the dead held.

Enters: the works held. Leaves: news of claims that are no longer ours, and blobs swept. The lease runs by the database's
clock alone.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import anyio
import structlog

from daemon import journal, metrics
from daemon.gate import AWAY
from daemon.work import Held
from storage.base import Beat, RefusedError, TaskStore, Tombstone

log = structlog.get_logger(__name__)

RESCUE_SECONDS = 5.0
TOMBSTONES_MAX = 100


class Lease:
    """This worker's life as the database sees it. `worker` is a fresh uuid of this process."""

    def __init__(self, store: TaskStore, worker: str, held: Held, lease_seconds: float, unserved_seconds: float) -> None:
        self._store = store
        self._worker = worker
        self._held = held
        self._lease_seconds = lease_seconds
        self._unserved_seconds = unserved_seconds
        self.kinds: Sequence[str] = ()
        self.info: Mapping[str, Any] = {}
        self.failing: Callable[[str], None] = lambda reason: None
        self.on_gone: Callable[[str, str], None] = lambda task_id, token: None
        self.beat_at = time.monotonic()

    async def announce(self) -> None:
        """Beat until the database has heard."""
        while True:
            try:
                await self.beat()
                return
            except AWAY as error:
                self.failing(str(error))
                await anyio.sleep(self._lease_seconds / 10)

    async def beat(self) -> None:
        """Tell what is held; works whose claim is gone stop."""
        works = [work for work in self._held if not work.settling]
        beat = Beat(
            self._worker,
            self._lease_seconds,
            self.info,
            self.kinds,
            [(work.task.id, work.task.token) for work in self._held],
            [work.task.id for work in self._held if work.begun],
            sorted(self._held.open_tokens),
        )
        gone = set(await self._store.beat(beat))
        self.beat_at = time.monotonic()
        for work in works:
            if (work.task.id, work.task.token) in gone and not work.settling:
                work.stopped = True
                log.warning("lease.gone", task=work.task.id, kind=work.task.kind)
                self.on_gone(work.task.id, work.task.token)

    async def run(self) -> None:
        """Beat for ever, three times a lease."""
        while True:
            try:
                await self.beat()
            except AWAY as error:
                metrics.BEATS_FAILED.inc()
                self.failing(str(error))
            await anyio.sleep(self._lease_seconds / 3)

    async def rescue(self, bury: Callable[[Tombstone], Awaitable[bool]]) -> None:
        """Rescue and sweep for ever. `bury` deletes the blobs under a tombstone."""
        while True:
            await anyio.sleep(min(RESCUE_SECONDS, self._lease_seconds / 2))
            try:
                rescued = await self._store.rescue(self._worker, self._unserved_seconds)
                if rescued:
                    metrics.RESCUED.inc(rescued)
                    log.warning("lease.rescued", tasks=rescued)
                await self._sweep(bury)
            except AWAY as error:
                self.failing(str(error))
            except RefusedError as error:  # some row that cannot be written: the living go on
                log.error("lease.refused", reason=str(error))

    async def _sweep(self, bury: Callable[[Tombstone], Awaitable[bool]]) -> None:
        done = []
        for tombstone in await self._store.tombstones(TOMBSTONES_MAX):
            if not await bury(tombstone):
                break  # the blob store fails, slowly perhaps: rescues must not wait for it
            done.append(tombstone.id)
        if done:
            await self._store.bury_tombstones(done)


async def blame_the_dead(store: TaskStore, folder: Path | None, database: str) -> None:
    """Report processes of this host that were killed, so that their rows go on at once and the right ones are blamed."""
    if folder is None:
        return
    for death in journal.deaths(folder, database):
        taken = await store.bury(death.worker, death.begun_ids)
        journal.forget(death)
        log.warning("lease.buried", worker=death.worker, tasks=taken, begun=len(death.begun_ids))
