"""Settle: writes how tasks ended, many in one call. At once when idle, else all that came while the last call was under way.

Enters: works with their ends. Leaves: rows, room for new claims. While the database is away outcomes wait here, bounded by what
the pools may hold, and in the spool, where a successor finds them. Only the verdict `lost` lets blobs be deleted.
"""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import orjson
import structlog

from daemon import metrics
from daemon.gate import AWAY, Gate
from daemon.infer import TimedOutError
from daemon.spool import Claim, Spool
from daemon.work import Held, Work
from handlers.base import RejectedError, UnservedError
from models.base import DeviceLostError
from storage.base import (
    ConfigurationError,
    Fate,
    InvalidImageError,
    MissingBlobError,
    Outcome,
    RefusedError,
    TaskStore,
    UnavailableError,
    Verdict,
)

log = structlog.get_logger(__name__)

BACKOFF_SECONDS_MAX = 300.0
SPOOL_AFTER_SECONDS = 0.5
DEATHS_MAX = 3
"""As in `maskd.rescue`: what took its worker with it so often, the last times alone, is given up."""
Ended = tuple[Work, Outcome]


def end_of(work: Work, error: Exception, retry_seconds: float) -> Outcome:
    """What an exception means for its task. User faults end at once, faults of the row retry, shared faults cost nothing."""
    task = work.task
    match error:
        case UnservedError():
            code, message = error.code, error.message
        case RejectedError() | InvalidImageError():
            return Outcome(task.id, task.token, Fate.FAILED, code=error.code, message=error.message)
        case UnavailableError() | ConfigurationError():
            return Outcome(task.id, task.token, Fate.RELEASED)
        case TimedOutError(alone=False):
            return Outcome(task.id, task.token, Fate.SUSPECT)
        case DeviceLostError() if task.deaths < DEATHS_MAX:
            return Outcome(task.id, task.token, Fate.SUSPECT)
        case DeviceLostError():
            message = "Work on this task ended its worker each time it ran alone; send another image or other parameters."
            return Outcome(task.id, task.token, Fate.FAILED, code="poison", message=message)
        case TimedOutError():
            message = "The work took longer than its time limit; send a smaller image or ask for less."
            return Outcome(task.id, task.token, Fate.FAILED, code="timeout", message=message)
        case MissingBlobError():
            code, message = "image_missing", "There is no image at that address; upload it first, then send the task again."
            if task.attempts > 1:
                return Outcome(task.id, task.token, Fate.FAILED, code=code, message=message)
        case MemoryError():
            code, message = (
                "out_of_memory",
                "The image or the number of prompts is too large for this worker's memory; send less.",
            )
        case _:
            code, message = "internal", "Something went wrong inside maskd; the log of the worker says what. Try again later."
    delay = min(BACKOFF_SECONDS_MAX, retry_seconds * 2 ** (task.attempts - 1)) * random.uniform(0.75, 1.25)
    return Outcome(task.id, task.token, Fate.RETRY, code=code, message=message, delay_seconds=delay)


def encode(values: dict[str, Any]) -> str:
    """JSON that Postgres takes: no NaN or infinity (null instead), no NUL, no lone surrogates."""
    try:
        text = orjson.dumps(values, option=orjson.OPT_NON_STR_KEYS).decode()
    except TypeError:  # a lone surrogate, or an integer of more than 64 bits
        text = json.dumps(_clean(values), allow_nan=False)
    return json.dumps(_clean(values), allow_nan=False) if "\\u0000" in text else text


def _clean(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\x00", "").encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {_clean(str(key)): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    return value


class Settler:
    """The one writer of ends."""

    def __init__(self, store: TaskStore, held: Held, gate: Gate, batch_max: int, spool: Spool) -> None:
        self._store = store
        self._held = held
        self._gate = gate
        self._batch_max = batch_max
        self._spool = spool
        self._waiting: list[Ended] = []
        self._writing: list[Ended] = []
        self._some = anyio.Event()
        self.on_lost: Callable[[Work], None] = lambda work: None
        self.on_leave: Callable[[Sequence[Work]], None] = lambda works: None
        self.on_again: Callable[[], None] = lambda: None

    def put(self, ended: Sequence[Ended]) -> None:
        """These works have ended so. Only the first end of a work counts."""
        for work, outcome in ended:
            if not work.settling:
                work.settling = True
                self._waiting.append((work, outcome))
        if self._waiting:
            self._some.set()

    async def run(self) -> None:
        """Write for ever."""
        while True:
            await self._some.wait()
            await self.flush()

    async def flush(self) -> None:
        """Write all that waits."""
        while self._waiting:
            self._writing, self._waiting = self._waiting[: self._batch_max], self._waiting[self._batch_max :]
            await self._write(self._writing)
            self._writing = []
        self._some = anyio.Event()

    async def keep(self) -> None:
        """Put on disk, for ever, what the database has not taken for a while: it is away, or slow."""
        before: set[Claim] = set()
        while True:
            await anyio.sleep(SPOOL_AFTER_SECONDS)
            unwritten = self._unwritten()
            await self._spool.keep([end for claim, end in unwritten.items() if claim in before and claim not in self._spool])
            before = set(self._unwritten())
            self._spool.forget([claim for claim in self._spool if claim not in before])  # settled while they were being kept

    def _unwritten(self) -> dict[Claim, Outcome]:
        return {(outcome.id, outcome.token): outcome for _, outcome in (*self._writing, *self._waiting)}

    async def _write(self, batch: Sequence[Ended]) -> None:
        outcomes = [outcome for _, outcome in batch]
        while True:
            try:
                verdicts = await self._store.settle(outcomes)
                break
            except AWAY as error:
                self._gate.shut("database", str(error))
                await self._gate.opened_for("database")
            except RefusedError as error:
                await self._bisect(batch, error)
                return
        metrics.SETTLE_BATCH.observe(len(batch))
        if verdicts:
            self._clean_up([work for work, _ in batch if verdicts.get((work.task.id, work.task.token)) is Verdict.LOST])
        fates = self._count([each for each in batch if (each[1].id, each[1].token) not in verdicts] if verdicts else batch)
        if len(self._spool):
            self._spool.forget([(outcome.id, outcome.token) for outcome in outcomes])
        works = [work for work, _ in batch]
        self.on_leave(works)
        self._held.drop(works)
        if not fates.isdisjoint((Fate.RETRY, Fate.RELEASED, Fate.SUSPECT)):
            self.on_again()  # nobody else announces rows that went back, or when they are due

    def _clean_up(self, lost: Sequence[Work]) -> None:
        for work in lost:
            metrics.LOST.inc()
            log.warning("settle.lost", task=work.task.id, kind=work.task.kind)
            self.on_lost(work)

    async def _bisect(self, batch: Sequence[Ended], error: RefusedError) -> None:
        """Something in the batch is not to be written: find it, and end that task alone as `internal`."""
        if len(batch) > 1:
            half = len(batch) // 2
            await self._write(batch[:half])
            await self._write(batch[half:])
            return
        work, outcome = batch[0]
        log.error("settle.refused", task=work.task.id, kind=work.task.kind, reason=str(error))
        if outcome.code == "internal" and outcome.values == "{}":
            # Not even a plain end can be written: something else of this database forbids it. The next beat gives the row back.
            log.error("settle.impossible", task=work.task.id, kind=work.task.kind)
            self._spool.forget([(outcome.id, outcome.token)])
            self.on_leave([work])
            self._held.drop([work])
            return
        message = "The result could not be written; the log of the worker says why."
        await self._write(
            [(work, Outcome(work.task.id, work.task.token, Fate.FAILED, code="internal", message=message, wrote=True))]
        )

    def _count(self, written: Sequence[Ended]) -> set[Fate]:
        """Count what was written; the fates among it."""
        counts = Counter([(work.task.kind, end.fate, end.code) for work, end in written])
        for (kind, fate, code), count in counts.items():
            metrics.SETTLED.labels(kind, fate.value).inc(count)
            if fate is Fate.FAILED and code is not None:
                metrics.FAILED.labels(code).inc(count)
        return {fate for _, fate, _ in counts}
