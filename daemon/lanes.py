"""Threads that make blocking calls, in three lanes: what a person waits for at once, what a person waits for longer, batches.

Enters: calls. Leaves: their answers, on the event loop. A thread takes from the first lane that has something.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from enum import IntEnum
from queue import SimpleQueue
from typing import Any

Done = Callable[[Any], None]
Call = tuple[Callable[[], Any], Done, Callable[[], None] | None]
"""What to run, who hears the answer, and who hears that it has begun."""


class Lane(IntEnum):
    """How soon; a click is also answered between the steps of what runs."""

    CLICK = 0
    SOON = 1
    BATCH = 2


class Threads:
    """Daemon threads that make blocking calls; answers come back on the event loop. Calls must not raise. `lost` of them hang
    past their time limit."""

    def __init__(self, name: str, count: int) -> None:
        self.count = count
        self.lost = 0
        self._lanes: tuple[deque[Call], ...] = tuple(deque() for _ in Lane)
        self._turns: SimpleQueue[None] = SimpleQueue()
        self._here = threading.local()
        self._loop = asyncio.get_running_loop()
        for number in range(count):
            threading.Thread(target=self._serve, name=f"{name}-{number}", daemon=True).start()

    def submit(
        self, call: Callable[[], Any], done: Done, lane: Lane = Lane.BATCH, began: Callable[[], None] | None = None
    ) -> None:
        """Run `call` on a thread, then `done(answer)` on the event loop; `began()` there once a thread has taken it."""
        self._lanes[lane].append((call, done, began))
        self._turns.put(None)

    def answer_clicks(self) -> float:
        """Make the calls of the first lane on this thread, one of ours between two steps of something longer; seconds spent."""
        if not self._lanes[Lane.CLICK]:
            return 0.0
        began = time.monotonic()
        self._here.lent = True
        while self._lanes[Lane.CLICK] and self._take(self._lanes[:1]):
            pass
        self._here.lent = False
        return time.monotonic() - began

    def lent(self) -> bool:
        """Whether the thread that asks makes a click's call between two steps of something else."""
        return bool(getattr(self._here, "lent", False))

    def _serve(self) -> None:
        going = True
        while going:
            self._turns.get()
            going = self._take(self._lanes)

    def _take(self, lanes: tuple[deque[Call], ...]) -> bool:
        """Make one call, if there is still one; whether the event loop lives."""
        for lane in lanes:
            try:
                call, done, began = lane.popleft()
            except IndexError:
                continue
            try:
                if began is not None:
                    self._loop.call_soon_threadsafe(began)
                answer = call()
                self._loop.call_soon_threadsafe(done, answer)
            except RuntimeError:  # the loop is closed: the process is ending
                return False
            break
        return True
