"""The flow: wake → claim → fetch → batch → infer → write → settle, joined in one task group; lease and gate beside it.

Enters: the parts. Leaves: nothing until `drain()`; then what runs is finished, the rest released with its attempt given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import structlog
from anyio.abc import TaskGroup

from daemon.claim import Claimer
from daemon.fetch import Fetcher
from daemon.gate import AWAY, Gate
from daemon.infer import Pool, PoolDiedError
from daemon.lease import Lease
from daemon.settle import Settler
from daemon.wake import Wake
from daemon.work import Held, Work
from daemon.write import Writer
from storage.base import Fate, Outcome, TaskStore, WakeSource

log = structlog.get_logger(__name__)

FLUSH_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Parts:
    """Everything that the flow is made of; put together by `daemon.main.build`."""

    worker: str
    store: TaskStore
    held: Held
    wake: Wake
    sources: Sequence[WakeSource]
    gate: Gate
    claimer: Claimer
    fetcher: Fetcher
    pools: Mapping[str, Pool]
    writer: Writer
    settler: Settler
    lease: Lease
    drain_seconds: float


class Pipeline:
    """One worker at work. `run()` until `drain()` or a fault; `abort()` ends at once."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.ready = anyio.Event()
        self._announcing = anyio.CancelScope()
        self._claiming = anyio.CancelScope()
        self._drain = anyio.Event()
        self._dead: PoolDiedError | None = None
        self._failed: asyncio.Future[None] | None = None

    @property
    def draining(self) -> bool:
        """Whether it was told to stop, or has to."""
        return self._drain.is_set()

    def drain(self) -> None:
        """Stop claiming, finish what runs within the limit, release the rest, return from `run`."""
        self._drain.set()
        self._announcing.cancel()

    async def run(self) -> None:
        """Work until drained. Raises PoolDiedError, or whatever crashed a loop."""
        parts = self.parts
        self._watch_callbacks()
        with self._announcing:
            await parts.lease.announce()
        async with anyio.create_task_group() as outer:
            for loop in (parts.gate.run, parts.lease.run, parts.settler.run, parts.settler.keep, self._fail_with_callbacks):
                outer.start_soon(loop)
            outer.start_soon(parts.lease.rescue, parts.writer.bury)
            for source in parts.sources:
                outer.start_soon(parts.wake.run, source)
            async with anyio.create_task_group() as inner:
                self._join(inner, outer)
                inner.start_soon(self._claim)
                self.ready.set()
                await self._drain.wait()
                self._claiming.cancel()
                await self._wind_up(inner)
            outer.cancel_scope.cancel()
        if not len(parts.held):
            with anyio.move_on_after(FLUSH_SECONDS):
                await self._leave()
        if self._dead is not None:
            raise self._dead

    def _join(self, inner: TaskGroup, outer: TaskGroup) -> None:
        """Each stage hands over to the next."""
        parts = self.parts
        parts.fetcher.ready = self._to_pools
        parts.fetcher.fail = parts.writer.fail
        parts.writer.end = parts.settler.put
        parts.writer.failing = lambda reason: parts.gate.shut("blobs", reason)
        parts.lease.failing = lambda reason: parts.gate.shut("database", reason)
        parts.settler.on_leave = parts.fetcher.leave
        parts.settler.on_again = partial(parts.wake.ring, "again")
        parts.settler.on_lost = partial(_start, outer, parts.writer.discard)
        parts.lease.on_gone = self._forget
        parts.wake.busy = lambda: len(parts.held) > 0
        for pool in parts.pools.values():
            pool.on_answers = lambda works, answers: parts.writer.answers(outer, works, answers)
            pool.on_dead = self._pool_died
        self._fetching = inner

    async def _claim(self) -> None:
        parts = self.parts
        with self._claiming:
            admit = partial(parts.fetcher.admit, self._fetching)
            await parts.claimer.run(list(parts.pools.values()), admit, parts.lease.announce)

    def _pool_died(self, error: PoolDiedError) -> None:
        """Nothing can run any more: give everything back, then end."""
        self._dead = self._dead or error
        self.drain()

    def _to_pools(self, works: Sequence[Work]) -> None:
        for pool in {work.pool for work in works}:
            self.parts.pools[pool].put([work for work in works if work.pool == pool and not work.stopped])

    def _forget(self, task_id: str, token: str) -> None:
        """A claim was cancelled or taken away: when nothing runs for it, its place is free at once."""
        work = self.parts.held.find(task_id, token)
        if work is not None:
            self.parts.settler.put([(work, Outcome(task_id, token, Fate.RELEASED))])

    async def _wind_up(self, inner: TaskGroup) -> None:
        """Release what has not begun, wait for what has, release that too when the limit is over."""
        parts = self.parts
        log.info("drain.begin", held=len(parts.held))
        self._release([work for work in parts.held if not work.begun])
        inner.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            with anyio.move_on_after(parts.drain_seconds):
                await parts.held.empty()
            self._release(list(parts.held))
            with anyio.move_on_after(FLUSH_SECONDS):
                await parts.held.empty()
        log.info("drain.end", left=len(parts.held))

    def _release(self, works: Sequence[Work]) -> None:
        for work in works:
            if not work.settling:
                work.stopped = True
                outcome = Outcome(work.task.id, work.task.token, Fate.RELEASED, wrote=work.begun)
                self.parts.settler.put([(work, outcome)])

    async def _leave(self) -> None:
        try:
            await self.parts.store.leave(self.parts.worker)
        except AWAY as error:
            log.warning("drain.not_signed_off", reason=str(error))

    def _watch_callbacks(self) -> None:
        """An exception in a callback of the event loop is a crash like any other, but not a connection's complaint that it was
        lost: whoever uses it is told so too, and the gate looks by itself."""
        loop = asyncio.get_running_loop()
        self._failed = loop.create_future()

        def handler(_loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
            error = context.get("exception")
            if isinstance(error, OSError):
                log.warning("loop.connection_lost", message=context.get("message"), reason=str(error))
            elif isinstance(error, Exception):
                self._fail(error)
            else:
                log.warning("loop.complaint", message=context.get("message"))

        loop.set_exception_handler(handler)

    def _fail(self, error: Exception) -> None:
        if self._failed is not None and not self._failed.done():
            self._failed.set_exception(error)

    async def _fail_with_callbacks(self) -> None:
        assert self._failed is not None
        await self._failed


def _start(tasks: TaskGroup, call: Callable[[Work], Coroutine[Any, Any, None]], work: Work) -> None:
    tasks.start_soon(call, work)
