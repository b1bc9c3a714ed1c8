"""Infer: pools of threads that run handlers. A CPU pool prepares, runs and finishes on one thread; a GPU pool owns its device by
one thread and leaves preparing and finishing to CPU threads, so that the device never waits for them. Asks of sessions go before
batches, on the same threads.

Enters: ready works. Leaves: per work a Result or an exception. A thread past its time limit is lost until it returns.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, TypeVar

import structlog

from daemon import metrics
from daemon.asks import Asks
from daemon.batch import Batcher
from daemon.journal import Journal
from daemon.lanes import Lane, Threads
from daemon.steps import Answer, Running, finish_batch, infer_batch, prepare_batch, run_batch
from daemon.work import Work
from handlers.base import Handler
from models.base import DeviceLostError, Models, Role, Stop

log = structlog.get_logger(__name__)

Asked = TypeVar("Asked")


class TimedOutError(Exception):
    """A job took longer than its limit, or, when it was not `alone`, one of those in its batch did."""

    def __init__(self, alone: bool = True) -> None:
        super().__init__()
        self.alone = alone


class PoolDiedError(Exception):
    """Every thread of a pool hangs past its time limit: the process must be started anew (exit code 75)."""


class DeviceDiedError(PoolDiedError):
    """A device answers nothing any more: the process must be started anew (exit code 76)."""


class Pool:
    """Where handlers run: `threads` at once, fed from a Batcher, bounded in batches in all stages together. `sizes`: the largest
    batch per kind."""

    def __init__(
        self,
        name: str,
        models: Models,
        handlers: Mapping[str, Handler],
        *,
        threads: int,
        prefetch_batches: int,
        sizes: Mapping[str, int],
        timeout_seconds: float,
        journal: Journal,
        aside: Threads | None = None,
        asks_max: int = 32,
    ) -> None:
        self.name = name
        self.models = models
        self.handlers = {kind: handler for kind, handler in handlers.items() if models.roles() >= handler.ROLES}
        self.kinds = tuple(sorted(self.handlers))
        self.sizes = sizes = {kind: sizes[kind] for kind in self.kinds}
        self.groups = tuple(tuple(kind for kind in self.kinds if sizes[kind] == size) for size in sorted(set(sizes.values())))
        self.batches_max = threads * (1 + prefetch_batches)
        self.capacity = self.batches_max * max(sizes.values(), default=1)
        self.batcher = Batcher(sizes)
        self._threads = Threads(f"maskd-{name}", threads)
        self._aside = aside
        # A device's memory is shared out per batch, so nothing else may run there between the steps of one.
        self._between = self._threads.answer_clicks if aside is None else _nothing
        self._asks = Asks(self._threads, threads + asks_max, timeout_seconds)
        self._asks.on_free = self.kick
        self._asks.on_hung, self._asks.on_back = partial(self._lose, self._threads), partial(self._regain, self._threads)
        self._asks.on_lost = self._device_lost
        self.slots = threads + (0 if aside is None else 1)  # a GPU's next batch is prepared while this one runs
        self._busy = 0
        self._batches = 0
        self._steps = 0
        self._running: set[Running] = set()
        self._dead = False
        self._timeout = timeout_seconds
        self._journal = journal
        self.on_answers: Callable[[Sequence[Work], Sequence[Answer]], None] = lambda works, answers: None
        self.on_dead: Callable[[PoolDiedError], None] = lambda error: None

    def room(self, kinds: Sequence[str], held: Mapping[str, int]) -> int:
        """How many works of `kinds`, which are one of `groups`, may be claimed beside what the pool holds of each kind: none
        for less than a batch, since small claims cost as much as large ones."""
        if self._dead or self.lost >= self._threads.count:
            return 0
        size = self.sizes[kinds[0]]
        free = self.batches_max - sum(count / self.sizes[kind] for kind, count in held.items())
        return int(free * size + 0.001) if free > 0.999 else 0

    @property
    def lost(self) -> int:
        """Threads of this pool that hang past their time limit."""
        return self._threads.lost

    def sign(self) -> int | None:
        """For the watchdog: None while nothing waits for a thread, or one is at work in its time; else the steps made so far."""
        at_work = len(self._asks) > 0 or any(running.taken and not running.overdue for running in self._running)
        waits = len(self.batcher) > 0 or any(not running.taken for running in self._running)
        return self._steps if waits and not at_work and not self._dead else None

    def put(self, works: Sequence[Work]) -> None:
        """These works have all that they need."""
        self.batcher.add(works)
        self.kick()

    @property
    def running(self) -> list[Running]:
        """The batches under way, the one that began first first."""
        return sorted(self._running, key=lambda running: running.number)

    async def ask(
        self,
        roles: frozenset[Role],
        call: Callable[[Stop], Asked],
        seconds: float,
        lane: Lane = Lane.CLICK,
        key: Hashable = None,
        number: int | None = None,
    ) -> Asked:
        """What `call(stop)` answers on one of the pool's threads, before batches; `roles` are those it uses. See `Asks.ask`."""

        def run(stop: Stop) -> Asked:
            self.models.make_room(roles, self.models)
            return call(stop)

        lend = None if lane is Lane.CLICK else self._between
        return await self._asks.ask(run, seconds, lane, key, number, lend)

    def arrived(self, key: Hashable) -> AbstractContextManager[int]:
        """A request has come, and may have to wait before it asks; see `Asks.arrived`."""
        return self._asks.arrived(key)

    def kick(self) -> None:
        """Start as many batches as there are threads that nothing else runs or waits for."""
        while (free := self.slots - self._busy - len(self._asks)) > 0 and not self._dead:
            works = self.batcher.take(free if self._aside is None else 1)
            if not works:
                return
            self._start(works)

    def _start(self, works: list[Work]) -> None:
        handler = works[0].handler
        self._batches += 1
        self._busy += 1
        seconds_max = self._timeout * handler.TIMEOUT_FACTOR * len(works)
        on = self._threads if self._aside is None else self._aside
        running = Running(self._batches, works, seconds_max, on, self._between)
        self._running.add(running)
        for work in works:
            work.begun = True
        metrics.BATCH.labels(works[0].task.kind).observe(len(works))
        metrics.BEGUN.inc(len(works))
        self._journal.begin(running.number, [work.task.id for work in works])
        if self._aside is None:
            self._submit(self._threads, running, partial(run_batch, handler, running, self.models), self._answered)
        else:
            self._submit(self._aside, running, partial(prepare_batch, handler, running, self.models), self._prepared)

    def _submit(self, threads: Threads, running: Running, call: Callable[[], Any], then: Callable[[Running, Any], None]) -> None:
        """One step of a batch. Its time runs from when a thread takes it: what waits in line hangs nowhere."""
        running.on, running.taken = threads, False
        threads.submit(call, partial(self._stepped, running, then), began=partial(self._limit, running))

    def _limit(self, running: Running) -> None:
        running.taken = True
        self._steps += 1
        running.timer = asyncio.get_running_loop().call_later(running.seconds_max, self._overdue, running)

    def _stepped(self, running: Running, then: Callable[[Running, Any], None], answer: Any) -> None:
        """A step is over, and its thread is back; what it brings is only wanted when it was in time."""
        if running.timer is not None:
            running.timer.cancel()
        if running.lost is not None:
            self._regain(running.lost)
            running.lost = None
        then(running, answer)

    def _prepared(self, running: Running, prepared: list[Any]) -> None:
        if running.overdue or self._dead:
            self._free()
            self._end(running)
            return
        handler = running.works[0].handler
        self._submit(self._threads, running, partial(infer_batch, handler, running, prepared, self.models), self._inferred)

    def _inferred(self, running: Running, raws: list[Any]) -> None:
        if running.given_back:
            self._free()
            self._end(running)
            return
        assert self._aside is not None
        self._look_for_loss(running, raws)
        self._free()
        handler = running.works[0].handler
        self._submit(self._aside, running, partial(finish_batch, handler, running, raws), self._finished)

    def _finished(self, running: Running, answers: list[Answer]) -> None:
        self._end(running)
        self._answer(running, answers)

    def _answered(self, running: Running, answers: list[Answer]) -> None:
        self._look_for_loss(running, answers)
        self._end(running)
        self._free()
        self._answer(running, answers)

    def _free(self) -> None:
        self._busy -= 1
        self.kick()

    def _end(self, running: Running) -> None:
        """Nothing of a batch runs any more."""
        self._running.discard(running)
        self._journal.end(running.number)
        metrics.BEGUN.dec(len(running.works))

    def _look_for_loss(self, running: Running, answers: Sequence[Any]) -> None:
        """When the device is lost nothing is started any more, and what has not been on it is nobody's fault."""
        lost = next((answer for answer in answers if isinstance(answer, DeviceLostError)), None)
        if lost is not None:
            self._device_lost(lost, running)

    def _device_lost(self, error: DeviceLostError, running: Running | None = None) -> None:
        if self._dead:
            return
        self._dead = True
        log.error("infer.device_lost", pool=self.name, reason=str(error))
        for other in [each for each in self._running if each is not running]:
            if other.on is not self._threads or not other.taken:
                other.given_back = True
                for work in other.works:
                    work.begun = False
        self.on_dead(DeviceDiedError(f"the device of pool {self.name} answers nothing any more: {error}"))

    def _answer(self, running: Running, answers: list[Answer]) -> None:
        seconds = time.monotonic() - running.started
        metrics.took("infer", seconds)
        spent = {"infer": round(seconds * 1000, 1)}
        for work in running.works:
            work.stages_ms = {**work.stages_ms, **spent} if work.stages_ms else spent
        if running.too_many > 1 or any(isinstance(answer, MemoryError) for answer in answers):
            metrics.OUT_OF_MEMORY.labels(self.name).inc()
        if running.too_many > 1:
            self.batcher.halve(running.works[0].task.kind, running.too_many)
        if not running.overdue:
            self.on_answers(running.works, answers)

    def _overdue(self, running: Running) -> None:
        lent = running.take_lent()
        hung = self._asks.hung_on_lent_threads > 0 and running.lending_since is not None
        if lent > 0 and not hung:
            running.timer = asyncio.get_running_loop().call_later(lent, self._overdue, running)
            return
        running.overdue = True
        running.lost = None if hung else running.on  # a thread that hangs in a click is counted by the click
        log.error(
            "infer.overdue", pool=self.name, tasks=[work.task.id for work in running.works], kind=running.works[0].task.kind
        )
        self.on_answers(running.works, [TimedOutError(alone=len(running.works) == 1) for _ in running.works])
        for work in running.works:
            work.stopped = True
        if running.lost is not None:
            self._lose(running.lost)

    def _lose(self, threads: Threads) -> None:
        """One more thread hangs."""
        threads.lost += 1
        metrics.THREADS_LOST.labels(self.name).set(self.lost)
        log.error("infer.thread_lost", pool=self.name, lost=threads.lost)
        if threads.lost >= threads.count:
            self.on_dead(PoolDiedError(f"every thread of pool {self.name} hangs past its time limit"))

    def _regain(self, threads: Threads) -> None:
        """A thread that hung has returned."""
        threads.lost -= 1
        metrics.THREADS_LOST.labels(self.name).set(self.lost)
        log.warning("infer.returned", pool=self.name, lost=threads.lost)


def _nothing() -> float:
    """What comes between the steps of a device, in seconds."""
    return 0.0
