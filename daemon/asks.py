"""Interactive asks: calls of sessions that run on a pool's threads before its batches, and who of them still wants an answer.

Enters: a call. Leaves: its answer to whoever awaits it. Never more than so many wait, none longer than it may.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from daemon.lanes import Lane, Threads
from models.base import DeviceLostError, Stop, StoppedError

Answer = TypeVar("Answer")
Call = Callable[[Stop], Any]


class BusyError(Exception):
    """As many asks wait as may."""


class SupersededError(Exception):
    """A newer ask with the same key came before this one began."""


class Ask:
    """One call. The loop sets `stopped`, the thread `begun`, `lent` (it runs between the steps of something else) and `lending`
    (a click runs between its own); what is stopped lets go of all that its call holds."""

    __slots__ = ("begun", "call", "future", "hung", "lend", "lending", "lent", "stopped", "threads", "timer")

    def __init__(self, call: Call, threads: Threads, lend: Callable[[], object] | None) -> None:
        self.call: Call | None = call
        self.threads = threads
        self.lend = lend
        self.lent = False
        self.lending = False
        self.timer: asyncio.TimerHandle | None = None
        self.future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.begun = False
        self.stopped = False
        self.hung = False

    def check(self) -> None:
        """What the call gets as its `stop`."""
        if self.stopped:
            raise StoppedError
        if self.lend is not None:
            self.lending = True
            self.lend()
            self.lending = False

    def run(self) -> Any:
        """The answer or the exception; on a thread."""
        call = self.call
        if self.stopped or call is None:
            return StoppedError()
        self.lent = self.threads.lent()
        self.begun = True
        try:
            return call(self.check)
        except Exception as error:
            return error
        except BaseException as error:  # a panic in native code comes as one; the thread, and what lends it, must live on
            return RuntimeError(f"{type(error).__name__}: {error}")

    def end(self, error: Exception | None = None) -> None:
        """Nobody wants it any more; who awaits it gets `error`."""
        self.stopped = True
        self.call = None
        if error is not None and not self.future.done():
            self.future.set_exception(error)


class Asks:
    """The asks of one pool, at most `most` that are not answered. `hung_seconds`: so long after its limit a call may still run
    until `on_hung` hears of it, and `on_back` when it returned after all; `on_free` is called whenever one is gone."""

    def __init__(self, threads: Threads, most: int, hung_seconds: float) -> None:
        self._threads = threads
        self._most = most
        self._hung_seconds = hung_seconds
        self._asks: set[Ask] = set()
        self._newest: dict[Hashable, Ask] = {}
        self._numbers: dict[Hashable, int] = {}
        self._count = itertools.count(1)
        self.on_free: Callable[[], None] = lambda: None
        self.on_hung: Callable[[], None] = lambda: None
        self.on_back: Callable[[], None] = lambda: None
        self.on_lost: Callable[[DeviceLostError], None] = lambda error: None

    def __len__(self) -> int:
        """How many need a thread of their own."""
        return sum(not ask.lent for ask in self._asks)

    @property
    def hung_on_lent_threads(self) -> int:
        """How many hang between the steps of something else."""
        return sum(ask.hung and ask.lent for ask in self._asks)

    @contextmanager
    def arrived(self, key: Hashable) -> Iterator[int]:
        """Say when a request has come, whatever it must wait for before it asks: a number for `ask`, by which it is seen which of
        two with one `key` is the newer."""
        number = next(self._count)
        if key is None:
            yield number
            return
        self._numbers[key] = number
        try:
            yield number
        finally:
            if self._numbers.get(key) == number:
                del self._numbers[key]

    async def ask(
        self,
        call: Callable[[Stop], Answer],
        seconds: float,
        lane: Lane,
        key: Hashable = None,
        number: int | None = None,
        lend: Callable[[], object] | None = None,
    ) -> Answer:
        """What `call(stop)` answers or raises; cancelled, it is not begun any more, or told to stop. `lend` is called at each
        `stop()`.

        TimeoutError after `seconds`, waiting included; BusyError at once; SupersededError when, before this one began, a newer
        one came with the same `key`.
        """
        if number is not None and self._numbers.get(key, number) > number:
            raise SupersededError
        older = self._newest.get(key) if key is not None else None
        if older is not None and not older.begun:
            older.end(SupersededError())
            self._asks.discard(older)
        if len(self._asks) >= self._most:
            raise BusyError
        ask = Ask(call, self._threads, lend)
        self._asks.add(ask)
        if key is not None:
            self._newest[key] = ask
        ask.timer = asyncio.get_running_loop().call_later(seconds + self._hung_seconds, self._hung, ask)
        self._threads.submit(ask.run, partial(self._answered, ask), lane)
        try:
            async with asyncio.timeout(seconds):
                answer: Answer = await ask.future
                return answer
        except BaseException:
            ask.end()
            raise
        finally:
            if key is not None and self._newest.get(key) is ask:
                del self._newest[key]
            if not ask.begun:
                self._asks.discard(ask)
                self.on_free()

    def _answered(self, ask: Ask, answer: Any) -> None:
        if ask.timer is not None:
            ask.timer.cancel()
        if ask.hung:
            self.on_back()
        self._asks.discard(ask)
        if isinstance(answer, DeviceLostError):
            self.on_lost(answer)
        if not ask.future.done():
            if isinstance(answer, Exception):
                ask.future.set_exception(answer)
            else:
                ask.future.set_result(answer)
        self.on_free()

    def _hung(self, ask: Ask) -> None:
        if ask.lending:  # a click that hangs in it is counted by itself: a thread is lost but once
            ask.timer = asyncio.get_running_loop().call_later(self._hung_seconds, self._hung, ask)
        elif ask.begun and ask in self._asks:
            ask.hung = True
            self.on_hung()
