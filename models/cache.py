"""The one place where embeddings are kept between tasks: least recently used goes first, counted in bytes per device.

Enters: images and their content hashes. Leaves: their embeddings, each computed once however many threads ask for it at a time.
"""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from models.base import Embedder, Embedding, ImageHWC, View

Key = tuple[str, str, str]
"""model_id, device, content hash."""
SMALLS_MAX = 8
"""Shrunk images that wait for their embedding; prompts on one image come together and share one."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A kept embedding; until that time it is one of a session, which outlives all of tasks."""

    embedding: Embedding
    session_until: float


class EmbeddingCache:
    """`models.base.Embeddings`, thread-safe. `bytes_max` holds per device; a larger embedding is given back but not kept. What a
    session has not used for `session_seconds` counts as a task's."""

    def __init__(self, bytes_max: int, session_seconds: float = 600.0, clock: Callable[[], float] = time.monotonic) -> None:
        self._bytes_max = bytes_max
        self._session_seconds = session_seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._pending: dict[Key, Future[Embedding]] = {}
        self._smalls: OrderedDict[Key, Any] = OrderedDict()
        self._hits = 0
        self._misses = 0

    @property
    def hits(self) -> int:
        """Questions answered without computing, also by waiting for another thread's answer."""
        return self._hits

    @property
    def misses(self) -> int:
        """Embeddings computed or tried."""
        return self._misses

    @property
    def bytes(self) -> int:
        """Bytes of all entries on all devices."""
        with self._lock:
            return sum(entry.embedding.nbytes for entry in self._entries.values())

    @property
    def entries(self) -> int:
        """How many embeddings are kept."""
        with self._lock:
            return len(self._entries)

    def view(self, embedder: Embedder, content_hash: str, image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> View:
        """The image, shrunk unless its embedding is there or on its way."""
        key = _key(embedder, content_hash)
        with self._lock:
            if key in self._entries or key in self._pending:
                return View(content_hash, image_hwc, None, size_hw)
            small = self._smalls.get(key)
        if small is None:
            small = embedder.shrink(image_hwc, size_hw)
            with self._lock:
                self._smalls[key] = small
                while len(self._smalls) > SMALLS_MAX:
                    self._smalls.popitem(last=False)
        return View(content_hash, image_hwc, small, size_hw)

    def get(self, embedder: Embedder, views: Sequence[View], of_session: bool = False) -> list[tuple[Embedding, bool]]:
        """Per view its embedding by that model, and whether it was there or on its way already; the others are computed in one
        call. Raises what `embedder.embed` raises; whoever waited for it asks again, alone.
        """
        answers: list[tuple[Embedding | Future[Embedding], bool]] = []
        mine: dict[Key, View] = {}
        with self._lock:
            for view in views:
                key = _key(embedder, view.content_hash)
                kept = self._entries.get(key)
                if kept is not None:
                    self._hits += 1
                    self._keep(key, Entry(kept.embedding, max(kept.session_until, self._until(of_session))))
                    answers.append((kept.embedding, True))
                    continue
                known = key in self._pending
                if not known:
                    self._misses += 1
                    self._pending[key] = Future()
                    mine[key] = view
                else:
                    self._hits += 1
                answers.append((self._pending[key], known))
        if mine:
            self._compute(mine, embedder, of_session)
        found = [
            (self._awaited(answer, view, embedder, of_session) if isinstance(answer, Future) else answer, cached)
            for (answer, cached), view in zip(answers, views, strict=True)
        ]
        if of_session:
            self._hold_for_sessions([_key(embedder, view.content_hash) for view in views])
        return found

    def kept(self, embedder: Embedder, content_hash: str) -> Embedding | None:
        """The embedding of a session's image if it is there; that counts as a use."""
        key = _key(embedder, content_hash)
        with self._lock:
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._hits += 1
            self._keep(key, Entry(entry.embedding, self._until(of_session=True)))
            return entry.embedding

    def discard(self, content_hash: str) -> None:
        """Forget that image for every model."""
        with self._lock:
            for key in [key for key in self._entries if key[2] == content_hash]:
                del self._entries[key]

    def _compute(self, mine: dict[Key, View], embedder: Embedder, of_session: bool) -> None:
        """Embed these and tell whoever waits for one of them, of the answer or that there is none."""
        try:
            views = list(mine.values())
            smalls = [embedder.shrink(view.image_hwc, view.size_hw) if view.small is None else view.small for view in views]
            embeddings = embedder.embed(smalls)
            if len(embeddings) != len(smalls):
                raise RuntimeError(f"{embedder.engine} made {len(embeddings)} embeddings of {len(smalls)} images")
        except BaseException as error:  # the waiters must hear of it, whatever it is
            for future in self._answered(mine):
                future.set_exception(error)
            raise
        with self._lock:
            for key, embedding in zip(mine, embeddings, strict=True):
                self._keep(key, Entry(embedding, self._until(of_session)))
        for future, embedding in zip(self._answered(mine), embeddings, strict=True):
            future.set_result(embedding)

    def _awaited(self, future: Future[Embedding], view: View, embedder: Embedder, of_session: bool) -> Embedding:
        """What another thread makes, or has made. Its failure may be another image's: then this one is asked for alone."""
        try:
            return future.result()
        except BaseException:
            return self.get(embedder, [view], of_session)[0][0]

    def _hold_for_sessions(self, keys: Sequence[Key]) -> None:
        """What a task had begun and a session asked for too outlives tasks."""
        with self._lock:
            for key in keys:
                if key in self._entries:
                    self._entries[key] = Entry(self._entries[key].embedding, self._until(of_session=True))

    def _until(self, of_session: bool) -> float:
        return self._clock() + self._session_seconds if of_session else 0.0

    def _answered(self, mine: dict[Key, View]) -> list[Future[Embedding]]:
        with self._lock:
            for key in mine:
                self._smalls.pop(key, None)
            return [self._pending.pop(key) for key in mine]

    def _keep(self, key: Key, entry: Entry) -> None:
        """Put an entry last in line and make room on its device; under the lock."""
        if entry.embedding.nbytes > self._bytes_max:
            return
        self._entries[key] = entry
        self._entries.move_to_end(key)
        here = [other for other in self._entries if other[1] == key[1]]
        held = sum(self._entries[other].embedding.nbytes for other in here)
        # Tasks' entries go first, each group from the least recently used; sorting is stable.
        now = self._clock()
        for other in sorted(here, key=lambda other: self._entries[other].session_until > now):
            if held <= self._bytes_max:
                return
            if other != key:
                held -= self._entries.pop(other).embedding.nbytes


def _key(embedder: Embedder, content_hash: str) -> Key:
    return embedder.model_id, embedder.device, content_hash
