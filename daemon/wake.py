"""Wake-up: hints from push sources, and polling that never stops. A hint carries no information.

Enters: callbacks of wake sources, free slots. Leaves: the claim loop goes round. Never claims anything itself. A hint that many
workers hear is answered by one after the other, idle ones first.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Callable, Sequence

import anyio
import structlog

from daemon import metrics
from storage.base import Task, WakeSource

log = structlog.get_logger(__name__)

IDLE_LONG_SECONDS = 300.0
IDLE_STRETCH = 2.0
REST_SECONDS = 60.0
SPREAD = 0.25
AT_ONCE_MAX = 4
"""So few workers all look at once when a hint comes."""
TURN_SECONDS = 0.005
"""Each worker more spreads their looks by so much: however many there are and however often they are called, those that find
nothing ask the database 400 times a second in all, not hundreds of times for each row."""
SPREAD_SECONDS_MAX = 0.5
YIELD_SECONDS = 0.01
"""Whoever has work in hand lets idle workers look first: what it took now would wait behind that work."""


class Wake:
    """A bell that any source may ring; a ring while nobody waits is kept. Knows whether push is proven, and how long there has
    been nothing to do: after `rest_seconds` the lease looks at the queue in passing, and polls are for when it cannot."""

    def __init__(self, poll_seconds: float, poll_unproven_seconds: float, rest_seconds: float = REST_SECONDS) -> None:
        self._poll_seconds = poll_seconds
        self._poll_unproven_seconds = poll_unproven_seconds
        self._rest_seconds = rest_seconds
        self.on_work: Callable[[], None] = lambda: None
        self._rung = anyio.Event()
        self._proven: dict[str, bool] = {}
        self._last_work = time.monotonic()
        self._polled = False
        self._looked: bool | None = None
        """What a look in passing found, while nobody else has rung."""
        self._sources: list[WakeSource] = []
        self.turns = 0
        """How often `wait` has looked around: while looks in passing find nothing it goes on waiting, and is well."""
        self._turn: asyncio.TimerHandle | None = None
        self.busy: Callable[[], bool] = lambda: False

    @property
    def mode(self) -> str:
        """push (every source proven), degraded (some), poll (none)."""
        states = list(self._proven.values())
        return "push" if states and all(states) else "degraded" if any(states) else "poll"

    @property
    def seconds_max(self) -> float:
        """The longest that a turn of `wait` may take."""
        return max(self._poll_seconds, self._poll_unproven_seconds) * IDLE_STRETCH * (1 + SPREAD)

    def ring(self, source: str = "inside") -> None:
        """There may be work."""
        metrics.WAKES.labels(source).inc()
        self._looked = None
        self._rung.set()

    def look(self, work: bool) -> None:
        """Somebody has looked at the queue in passing, and found `work` or not: as good as a poll, whose time begins anew."""
        if not self._rung.is_set():
            self._looked = work
            self._rung.set()
            if work:
                metrics.WAKES.labels("look").inc()

    def hint(self, source: WakeSource) -> None:
        """A source says that there may be work: ring when it is our turn. One that comes until then is answered with it."""
        if self._turn is not None:
            return
        seconds = turn_seconds(source.workers, self.busy())
        if seconds > 0:
            self._turn = asyncio.get_running_loop().call_later(seconds, self._take_turn, source.name)
        else:
            self.ring(source.name)

    def turn(self) -> float:
        """How many seconds to leave what comes now to others, who have less to do."""
        return turn_seconds(max((source.workers for source in self._sources), default=1), self.busy())

    def worked(self) -> None:
        """There was work: the queue is not idle."""
        self._last_work = time.monotonic()
        self.on_work()

    def is_idle(self) -> bool:
        """Whether there was nothing to do for so long that the worker may rest."""
        return self._idle_seconds() > self._rest_seconds

    def found(self, tasks: Sequence[Task]) -> None:
        """What a claim brought. When nobody had rung for it, the sources hear what they did not announce."""
        if self._polled and tasks:
            for source in self._sources:
                metrics.WAKE_MISSED.labels(source.name).inc(source.polled(tasks))

    async def wait(self, next_due_seconds: float | None) -> None:
        """Until the bell rings, the next delayed row is due, or it is time to look anyway."""
        due_at = math.inf if next_due_seconds is None else time.monotonic() + max(0.0, next_due_seconds) + 0.005
        while True:
            self.turns += 1
            interval, due = self._interval(), due_at - time.monotonic()
            with anyio.move_on_after(min(interval, due)) as waited:
                await self._rung.wait()
            looked = None if waited.cancelled_caught else self._looked
            self._polled = looked is True or (waited.cancelled_caught and interval < due)
            if waited.cancelled_caught and interval < due:
                metrics.WAKES.labels("poll").inc()
            self._looked, self._rung = None, anyio.Event()  # a hint whose turn is still to come stays
            if looked is not False:
                return

    @property
    def yields(self) -> bool:
        """Whether a hint came and others look first."""
        return self._turn is not None

    def forget(self) -> None:
        """A claim is about to look: rings and hints until now are answered by it."""
        self._looked = None
        if self._turn is not None:
            self._turn.cancel()
            self._turn = None
        if self._rung.is_set():
            self._rung = anyio.Event()

    async def run(self, source: WakeSource) -> None:
        """Serve one push source for ever."""
        self._proven[source.name] = False
        metrics.PUSH_LIVE.labels(source.name).set(0)
        self._sources.append(source)
        metrics.announce_source(source.name, source.reasons)
        source.on_ended = lambda reason: metrics.WAKE_ENDED.labels(source.name, reason).inc()

        def proven(state: bool) -> None:
            if self._proven[source.name] != state:
                self._proven[source.name] = state
                log.info("wake.mode", source=source.name, proven=state, mode=self.mode)
                self.ring()  # look now, and from now on as often as the mode asks
            metrics.PUSH_LIVE.labels(source.name).set(state)
            metrics.set_mode(self.mode)

        await source.run(lambda: self.hint(source), proven)

    def _take_turn(self, source: str) -> None:
        self._turn = None
        self.ring(source)

    def _idle_seconds(self) -> float:
        return time.monotonic() - self._last_work

    def _interval(self) -> float:
        proven = self.mode == "push"
        seconds = self._poll_seconds if proven else self._poll_unproven_seconds
        if self._idle_seconds() > (self._rest_seconds if proven else IDLE_LONG_SECONDS):
            seconds *= IDLE_STRETCH
        return seconds * random.uniform(1 - SPREAD, 1 + SPREAD)


def turn_seconds(workers: int, busy: bool) -> float:
    """How long to wait before looking, once a hint came that `workers` hear: at random within what they share, the busy after
    the idle; not at all for one alone."""
    spread = min(TURN_SECONDS * max(0, workers - AT_ONCE_MAX), SPREAD_SECONDS_MAX)
    after_idle = max(spread, YIELD_SECONDS) if busy and workers > 1 else 0.0
    return after_idle + random.uniform(0.0, spread)
