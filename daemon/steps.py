"""Steps: what a batch goes through on a thread. Prepare, infer, finish, each per job, so that a bad one spoils no other.

Enters: a batch that runs. Leaves: per work a Result or an exception. Decides nothing about threads, knows no database.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from daemon.lanes import Threads
from daemon.work import Work
from handlers.base import Handler, Result, roles_in
from models.base import DeviceLostError, Models, StoppedError

LENT_SECONDS_MIN = 0.001
Answer = Result | Exception


@dataclass(slots=True, eq=False)
class Running:
    """One batch on a thread."""

    number: int
    works: list[Work]
    seconds_max: float
    on: Threads
    """Whose thread it is on, or waits for."""
    between: Callable[[], float]
    """Answers clicks between two steps; seconds spent."""
    timer: asyncio.TimerHandle | None = None
    overdue: bool = False
    lost: Threads | None = None
    """Whose thread hangs in it."""
    taken: bool = False
    """Whether a thread has taken the step that it is at."""
    given_back: bool = False
    """Whether it never was on the device that is lost."""
    too_many: int = 0
    """How many jobs together ran out of memory."""
    lent_seconds: float = 0.0
    lending_since: float | None = None
    share: float | None = None
    """How much of it is done, 0..1, as its handler told last."""
    started: float = field(default_factory=time.monotonic)

    def take_lent(self) -> float:
        """Seconds since the last time that this was asked which clicks took of the thread, one that still does included."""
        since, now = self.lending_since, time.monotonic()
        lent, self.lent_seconds = self.lent_seconds, 0.0
        if since is not None:
            lent += now - since
            self.lending_since = now
        return lent if lent >= LENT_SECONDS_MIN else 0.0

    def progress(self, share: float) -> None:
        """Handlers may tell how far they are."""
        self.share = share

    def __call__(self) -> None:
        """The handlers' `stop`, called between steps; it raises once nobody wants any of the batch."""
        if all(work.stopped for work in self.works):
            raise StoppedError
        self.lending_since = time.monotonic()
        spent = self.between()
        since, self.lending_since = self.lending_since, None
        if spent and since is not None:
            self.lent_seconds += time.monotonic() - since


def run_batch(handler: Handler, running: Running, models: Models) -> list[Answer]:
    """All three steps on one thread."""
    return finish_batch(handler, running, infer_batch(handler, running, prepare_batch(handler, running, models), models))


def prepare_batch(handler: Handler, running: Running, models: Models) -> list[Any]:
    """What `run` needs, or the exception that preparing raised, per work."""
    return [_attempt(handler.prepare, work.job, models) for work in running.works]


def infer_batch(handler: Handler, running: Running, prepared: Sequence[Any], models: Models) -> list[Any]:
    """Raw answers or exceptions, per work; a batch that fails as a whole is tried one by one, by halves if memory ran out."""
    if running.given_back:
        return []
    good = [item for item in prepared if not isinstance(item, Exception)]
    answers = iter(_infer(handler, good, models, running))
    return [item if isinstance(item, Exception) else next(answers) for item in prepared]


def finish_batch(handler: Handler, running: Running, raws: Sequence[Any]) -> list[Answer]:
    """Results or exceptions, per work."""
    pairs = zip(running.works, raws, strict=True)
    return [raw if isinstance(raw, Exception) else _attempt(handler.finish, work.job, raw) for work, raw in pairs]


def _infer(handler: Handler, items: Sequence[Any], models: Models, running: Running) -> Sequence[Any]:
    if not items:
        return ()
    answers = _attempt(_run, handler, items, models, running)
    if isinstance(answers, Exception):
        if len(items) == 1 or isinstance(answers, StoppedError | DeviceLostError):
            return [answers] * len(items)
        if isinstance(answers, MemoryError):
            running.too_many = max(running.too_many, len(items))
        part = len(items) // 2 if isinstance(answers, MemoryError) else 1
        parts = [items[first : first + part] for first in range(0, len(items), part)]
        return [answer for each in parts for answer in _infer(handler, each, models, running)]
    if len(answers) != len(items):
        return [RuntimeError(f"the handler answered {len(answers)} of {len(items)} jobs")] * len(items)
    return answers  # type: ignore[no-any-return]


def _run(handler: Handler, items: Sequence[Any], models: Models, stop: Callable[[], None]) -> Sequence[Any]:
    models.make_room(roles_in(handler, models.roles()), models)
    return handler.run(items, models, stop)


def _attempt(call: Callable[..., Any], *args: Any) -> Any:
    """The answer, or the exception as a value: one bad job never fails its neighbours."""
    try:
        return call(*args)
    except Exception as error:
        return error
    except BaseException as error:  # a panic in native code comes as one; the thread must live on
        return RuntimeError(f"{type(error).__name__}: {error}")
