"""One claimed task on its way through the stages, and the list of all that this worker holds.

Every stage finds here what it may still do: a work whose `stopped` is set is wanted by nobody any more.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import anyio

from daemon import metrics
from handlers.base import Handler, Job
from models.base import StoppedError
from storage.base import Task


@dataclass(slots=True, eq=False)
class Work:
    """A task that this worker holds. Only the event loop changes it; threads read `stopped`."""

    task: Task
    handler: Handler
    pool: str
    params: Any = None
    job: Job | None = None
    begun: bool = False
    stopped: bool = False
    settling: bool = False
    stages_ms: Mapping[str, float] | None = None

    @property
    def key_prefix(self) -> str:
        """Where this attempt's blobs lie; no other attempt ever writes there."""
        return f"masks/{self.task.project_id}/{self.task.id}/{self.task.token}/"

    def check(self) -> None:
        """Raise StoppedError when nobody wants the answer any more."""
        if self.stopped:
            raise StoppedError

    def spent(self, stage: str, since: float) -> None:
        """Note the time of a stage of this task that began at `since` (time.monotonic)."""
        seconds = time.monotonic() - since
        self.stages_ms = {**(self.stages_ms or {}), stage: round(seconds * 1000, 1)}
        metrics.took(stage, seconds)


class Held:
    """All works of this process by their claims, the tokens of claims still open, and a signal when works leave."""

    def __init__(self) -> None:
        self._works: dict[tuple[str, str], Work] = {}  # by claim: a task may come back before its old claim has left
        self._count: dict[str, Counter[str]] = {}
        self.open_tokens: set[str] = set()
        self._left = anyio.Event()
        self.on_leave: Callable[[], None] | None = None

    def __len__(self) -> int:
        return len(self._works)

    def __iter__(self) -> Iterator[Work]:
        return iter(list(self._works.values()))

    def count(self, pool: str) -> int:
        """How many works that pool holds."""
        return self.kinds(pool).total()

    def kinds(self, pool: str) -> Counter[str]:
        """How many works of each kind that pool holds."""
        return self._count.get(pool, Counter())

    def find(self, task_id: str, token: str) -> Work | None:
        return self._works.get((task_id, token))

    def add(self, works: Iterable[Work]) -> None:
        for work in works:
            self._works[work.task.id, work.task.token] = work
            self._count.setdefault(work.pool, Counter())[work.task.kind] += 1

    def drop(self, works: Iterable[Work]) -> None:
        """Works that are settled leave, which makes room for the next."""
        for work in works:
            if self._works.pop((work.task.id, work.task.token), None) is not None:
                self._count[work.pool][work.task.kind] -= 1
        self._left.set()
        self._left = anyio.Event()
        if self.on_leave is not None:
            self.on_leave()

    async def empty(self) -> None:
        """Return once nothing is held."""
        while self._works:
            await self._left.wait()
