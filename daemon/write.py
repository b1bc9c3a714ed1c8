"""Write: stores the blobs of a result under keys of this attempt alone, then hands the outcome to settle, which publishes them.

Enters: answers of the pools. Leaves: outcomes. A blob is never overwritten, and none is deleted but after `lost`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import anyio
import anyio.to_thread
import structlog
from anyio.abc import TaskGroup

from daemon import metrics
from daemon.gate import AWAY
from daemon.keys import Keys
from daemon.settle import Ended, encode, end_of
from daemon.steps import Answer
from daemon.work import Work
from handlers.base import Result, ResultBlob
from models.base import StoppedError
from storage.base import BlobStore, Fate, Outcome, Tombstone, UnavailableError

log = structlog.get_logger(__name__)

SWEEP_KEYS_MAX = 1000


class Writer:
    """Puts blobs, and deletes those that nobody needs. `end` takes outcomes; `failing` hears of a blob store that fails."""

    def __init__(self, blobs: BlobStore, keys: Keys, io_threads: int, retry_seconds: float, timeout_seconds: float) -> None:
        self._blobs = blobs
        self._keys = keys
        self._retry_seconds = retry_seconds
        self._timeout_seconds = timeout_seconds
        self._io = anyio.CapacityLimiter(io_threads)
        self.end: Callable[[Sequence[Ended]], None] = lambda ended: None
        self.failing: Callable[[str], None] = lambda reason: None

    def answers(self, tasks: TaskGroup, works: Sequence[Work], answers: Sequence[Answer]) -> None:
        """Take over what a batch answered."""
        ended = []
        for work, answer in zip(works, answers, strict=True):
            if isinstance(answer, Exception):
                self.fail(work, answer)
            elif answer.blobs:
                tasks.start_soon(self._write, work, answer)
            else:
                ended.append((work, _done(work, answer, {})))
        self.end(ended)

    def fail(self, work: Work, error: Exception, wrote: bool = False) -> None:
        """`work` ends by an error; what nobody wants any more ends without a word."""
        if isinstance(error, StoppedError) and work.stopped:
            return
        outcome = end_of(work, error, self._retry_seconds)
        if outcome.fate is Fate.RELEASED:
            self.failing(str(error))
        if outcome.code == "internal":
            log.error("task.failed", task=work.task.id, kind=work.task.kind, exc_info=error)
        if wrote:
            outcome = replace(outcome, wrote=True)
        self.end([(work, outcome)])

    async def discard(self, work: Work) -> None:
        """The claim was lost: this attempt's blobs are nobody's."""
        try:
            await self._delete_under(work.key_prefix)
        except AWAY as error:
            log.warning("write.discard_failed", task=work.task.id, reason=str(error))

    async def bury(self, tombstone: Tombstone) -> bool:
        """Delete everything under a tombstone; whether it is done with."""
        try:
            await self._delete_under(tombstone.prefix)
        except AWAY as error:
            self.failing(str(error))
            return False
        return True

    async def _write(self, work: Work, result: Result) -> None:
        started = time.monotonic()
        addresses: dict[str, str] = {}
        try:
            for blob in result.blobs:
                work.check()
                addresses[blob.column] = self._keys.address_of(await self._put(work, blob))
            work.check()
        except Exception as error:
            self.fail(work, error, wrote=True)
            if work.stopped:  # what was deleted when the claim was lost may have been too early for the last blob
                await self.discard(work)
            return
        work.spent("write", started)
        self.end([(work, _done(work, result, addresses))])

    async def _put(self, work: Work, blob: ResultBlob) -> str:
        key = work.key_prefix + blob.name
        await self._in_time(self._blobs.put, key, blob.data, blob.content_type)
        return key

    async def _delete_under(self, prefix: str) -> None:
        while keys := await self._in_time(self._blobs.list, prefix, SWEEP_KEYS_MAX):
            await self._in_time(self._blobs.delete, keys)
            metrics.ORPHANS.inc(len(keys))
            if len(keys) < SWEEP_KEYS_MAX:
                return

    async def _in_time(self, call: Callable[..., Any], *args: Any) -> Any:
        """A call of the blob store in a thread; UnavailableError past the time limit, whatever time-outs the store has itself."""
        with anyio.move_on_after(self._timeout_seconds):
            return await anyio.to_thread.run_sync(call, *args, limiter=self._io, abandon_on_cancel=True)
        raise UnavailableError("the blob store did not answer in time")


def _done(work: Work, result: Result, addresses: dict[str, str]) -> Outcome:
    stages = work.stages_ms or {}
    metadata = {
        **result.metadata,
        "attempts": work.task.attempts,
        "inference_time_ms": stages.get("infer", 0.0),
        "stages_ms": stages,
    }
    values = encode({**addresses, "labels": result.labels, "metadata": metadata})
    return Outcome(work.task.id, work.task.token, Fate.DONE, values)
