"""Lease, beside the flow: beats say that this worker lives and what it holds; rescues take back what the dead held. A worker that
has held nothing for a while rests: one call does for both, every two thirds of a lease.

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

from daemon import journal, metrics, spool
from daemon.gate import AWAY
from daemon.work import Held
from storage.base import Beat, Outcome, RefusedError, TaskStore, Tended, Tombstone, UnknownFunctionError, Verdict

log = structlog.get_logger(__name__)

RESCUE_SECONDS = 5.0
TOMBSTONES_MAX = 100
LATE_SECONDS = 0.5
"""A look for a silent worker comes so much later than its lease is over, and no oftener than twice that."""


def rest_seconds(lease_seconds: float, silent_seconds: float | None) -> float:
    """How long a worker may rest. Two thirds of its lease: a call may fail and it is still not silent, and nobody can claim and
    then be silent for a whole lease in between. Less when a worker that holds rows would be silent before."""
    usual = lease_seconds * 2 / 3
    return usual if silent_seconds is None else min(usual, max(2 * LATE_SECONDS, silent_seconds + LATE_SECONDS))


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
        self.news: Callable[[], Mapping[str, Any]] = dict
        self.failing: Callable[[str], None] = lambda reason: None
        self.on_gone: Callable[[str, str], None] = lambda task_id, token: None
        self.may_rest: Callable[[], bool] = lambda: False
        self.on_look: Callable[[bool], None] = lambda work: None
        self.beat_at = time.monotonic()
        self._resting = False
        self._stirred = anyio.Event()
        self._tombstones: Sequence[Tombstone] = ()

    def stir(self) -> None:
        """There is work: whoever rests beats now."""
        if self._resting:
            self._resting = False
            self._stirred.set()

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
            {**self.info, **self.news()},
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
        """Beat for ever, three times a lease; or rest."""
        while True:
            self._stirred = anyio.Event()
            self._resting = self.may_rest() and not self._held and not self._held.open_tokens
            seconds = self._lease_seconds / 3
            try:
                tended = await self._tend() if self._resting else None
                if tended is not None:
                    seconds = rest_seconds(self._lease_seconds, tended.silent_seconds)
                else:
                    self._resting = False
                    await self.beat()
            except AWAY as error:
                self._resting = False
                metrics.BEATS_FAILED.inc()
                self.failing(str(error))
            with anyio.move_on_after(seconds):
                await self._stirred.wait()

    async def rescue(self, bury: Callable[[Tombstone], Awaitable[bool]]) -> None:
        """Rescue and sweep for ever, unless resting does it. `bury` deletes the blobs under a tombstone."""
        while True:
            await anyio.sleep(min(RESCUE_SECONDS, self._lease_seconds / 2))
            try:
                due, self._tombstones = self._tombstones, ()
                if not self._resting:
                    self._count_rescued(await self._store.rescue(self._worker, self._unserved_seconds))
                    due = await self._store.tombstones(TOMBSTONES_MAX)
                await self._sweep(due, bury)
            except AWAY as error:
                self.failing(str(error))
            except RefusedError as error:  # some row that cannot be written: the living go on
                log.error("lease.refused", reason=str(error))

    async def _tend(self) -> Tended | None:
        """The one call; None when it must be beats and rescues after all."""
        ahead = rest_seconds(self._lease_seconds, None)
        try:
            tended = await self._store.tend(self._worker, self._lease_seconds, self._unserved_seconds, TOMBSTONES_MAX, ahead)
        except (RefusedError, UnknownFunctionError) as error:
            log.warning("lease.no_rest", reason=str(error))
            return None
        except AWAY as error:  # or what it waited for is locked by somebody, whom a beat need not wait for
            self.failing(str(error))
            return None
        if tended is not None:
            self.beat_at = time.monotonic()
            self._tombstones = tended.tombstones
            self._count_rescued(tended.rescued)
            self.on_look(tended.work)
        return tended

    def _count_rescued(self, rescued: int) -> None:
        if rescued:
            metrics.RESCUED.inc(rescued)
            log.warning("lease.rescued", tasks=rescued)

    async def _sweep(self, due: Sequence[Tombstone], bury: Callable[[Tombstone], Awaitable[bool]]) -> None:
        done = []
        for tombstone in due:
            if not await bury(tombstone):
                break  # the blob store fails, slowly perhaps: rescues must not wait for it
            done.append(tombstone.id)
        if done:
            await self._store.bury_tombstones(done)


async def succeed_the_dead(store: TaskStore, folder: Path, database: str, batch_max: int) -> None:
    """For processes of this host that were killed: publish what they had finished, where the claim still stands, then report
    them, so that their other rows go on at once and the right ones are blamed. Blobs of what is lost have their tombstones."""
    for lot in spool.left_behind(folder, database):
        lost = 0
        for first in range(0, len(lot.outcomes), batch_max):
            lost += await _publish(store, lot.outcomes[first : first + batch_max])
        spool.remove(lot)
        log.warning("lease.published", worker=lot.worker, tasks=len(lot.outcomes) - lost, lost=lost)
    for death in journal.deaths(folder, database):
        taken = await store.bury(death.worker, death.begun_ids)
        journal.forget(death)
        log.warning("lease.buried", worker=death.worker, tasks=taken, begun=len(death.begun_ids))


async def _publish(store: TaskStore, outcomes: Sequence[Outcome]) -> int:
    """Settle for a predecessor; how many were not written. What the database does not take is left out: its row goes back."""
    try:
        verdicts = await store.settle(outcomes)
    except RefusedError as error:
        if len(outcomes) > 1:
            half = len(outcomes) // 2
            return await _publish(store, outcomes[:half]) + await _publish(store, outcomes[half:])
        log.error("settle.refused", task=outcomes[0].id, reason=str(error))
        return 1
    return sum(verdict is Verdict.LOST for verdict in verdicts.values())
