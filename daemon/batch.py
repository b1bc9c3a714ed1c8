"""Batch: works that are ready, grouped by kind, oldest first. Pure: knows nothing of threads or time.

Enters: ready works. Leaves: batches of one kind, spread over the threads that are free, halved for a while after running out
of memory.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

from daemon.work import Work

RECOVER_AFTER_BATCHES = 20


class Batcher:
    """Ready works of one pool. `most` is the largest batch per kind."""

    def __init__(self, most: Mapping[str, int]) -> None:
        self._most = dict(most)
        self._ready: dict[str, deque[Work]] = {}
        self._order: deque[str] = deque()
        self._halved: dict[str, tuple[int, int]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._ready.values()))

    def add(self, works: Sequence[Work]) -> None:
        """These may run now."""
        for kind in {work.task.kind: None for work in works}:
            if kind not in self._ready:
                self._ready[kind] = deque()
                self._order.append(kind)
            self._ready[kind].extend([work for work in works if work.task.kind == kind])

    def take(self, free_threads: int) -> list[Work]:
        """The next batch, or nothing. Kinds take turns; a batch leaves work for the other free threads."""
        while self._order:
            kind = self._order.popleft()
            waiting = self._ready[kind]
            size = min(-(-len(waiting) // max(1, free_threads)), self._limit(kind))
            batch = [work for work in (waiting.popleft() for _ in range(size)) if not work.stopped]
            if waiting:
                self._order.append(kind)
            else:
                del self._ready[kind]
            if batch:
                return batch
        return []

    def halve(self, kind: str, tried: int) -> None:
        """A batch of `tried` ran out of memory: smaller ones for a while."""
        self._halved[kind] = (max(1, tried // 2), RECOVER_AFTER_BATCHES)

    def _limit(self, kind: str) -> int:
        limit, left = self._halved.get(kind, (self._most[kind], 0))
        if left > 0:
            self._halved[kind] = (limit, left - 1)
            if left == 1:
                del self._halved[kind]
        return limit
