"""Wake-up: hints from push sources, and polling that never stops. A hint carries no information.

Enters: callbacks of wake sources, free slots. Leaves: the claim loop goes round. Never claims anything itself.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Sequence

import anyio
import structlog

from daemon import metrics
from storage.base import Task, WakeSource

log = structlog.get_logger(__name__)

IDLE_LONG_SECONDS = 300.0
IDLE_STRETCH = 2.0


class Wake:
    """A bell that any source may ring; a ring while nobody waits is kept. Knows whether push is proven."""

    def __init__(self, poll_seconds: float, poll_unproven_seconds: float) -> None:
        self._poll_seconds = poll_seconds
        self._poll_unproven_seconds = poll_unproven_seconds
        self._rung = anyio.Event()
        self._proven: dict[str, bool] = {}
        self._last_work = time.monotonic()
        self._polled = False
        self._sources: list[WakeSource] = []

    @property
    def mode(self) -> str:
        """push (every source proven), degraded (some), poll (none)."""
        states = list(self._proven.values())
        return "push" if states and all(states) else "degraded" if any(states) else "poll"

    def ring(self, source: str = "inside") -> None:
        """There may be work."""
        metrics.WAKES.labels(source).inc()
        self._rung.set()

    def worked(self) -> None:
        """There was work: the queue is not idle."""
        self._last_work = time.monotonic()

    def found(self, tasks: Sequence[Task]) -> None:
        """What a claim brought. When nobody had rung for it, the sources hear what they did not announce."""
        if self._polled and tasks:
            for source in self._sources:
                source.polled(tasks)

    async def wait(self, next_due_seconds: float | None) -> None:
        """Until the bell rings, the next delayed row is due, or it is time to look anyway."""
        due = math.inf if next_due_seconds is None else max(0.0, next_due_seconds) + 0.005
        interval = self._interval()
        with anyio.move_on_after(min(interval, due)) as waited:
            await self._rung.wait()
        self._polled = waited.cancelled_caught and interval < due
        self._rung = anyio.Event()

    def forget(self) -> None:
        """A claim is about to look: rings until now are answered by it."""
        if self._rung.is_set():
            self._rung = anyio.Event()

    async def run(self, source: WakeSource) -> None:
        """Serve one push source for ever."""
        self._proven[source.name] = False
        self._sources.append(source)

        def proven(state: bool) -> None:
            if self._proven[source.name] != state:
                self._proven[source.name] = state
                log.info("wake.mode", source=source.name, proven=state, mode=self.mode)
                self.ring()  # look now, and from now on as often as the mode asks
            metrics.set_mode(self.mode)

        await source.run(lambda: self.ring(source.name), proven)

    def _interval(self) -> float:
        seconds = self._poll_seconds if self.mode == "push" else self._poll_unproven_seconds
        if time.monotonic() - self._last_work > IDLE_LONG_SECONDS:
            seconds *= IDLE_STRETCH
        return seconds * random.uniform(0.75, 1.25)
