"""The one place where embeddings are kept between tasks: least recently used goes first, counted in bytes per device.

Enters: an image and its content hash. Leaves: its embedding, computed once however many threads ask for it at a time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass

from models.base import Embedder, Embedding, ImageHWC

Key = tuple[str, str, str]
"""model_id, device, content hash."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A kept embedding; one of a session outlives all of tasks."""

    embedding: Embedding
    of_session: bool


class EmbeddingCache:
    """`models.base.Embeddings`, thread-safe. `bytes_max` holds per device; a larger embedding is given back but not kept."""

    def __init__(self, bytes_max: int) -> None:
        self._bytes_max = bytes_max
        self._lock = threading.Lock()
        self._entries: OrderedDict[Key, Entry] = OrderedDict()
        self._pending: dict[Key, Future[Embedding]] = {}
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

    def get(self, embedder: Embedder, content_hash: str, image_hwc: ImageHWC, of_session: bool = False) -> tuple[Embedding, bool]:
        """The embedding of that image by that model, and whether it was there or on its way already.

        Raises what `embedder.embed` raises, to every thread that waited for it; the next question tries again.
        """
        key = (embedder.model_id, embedder.device, content_hash)
        with self._lock:
            kept = self._entries.get(key)
            if kept is not None:
                self._hits += 1
                self._keep(key, Entry(kept.embedding, kept.of_session or of_session))
                return kept.embedding, True
            awaited = self._pending.get(key)
            if awaited is None:
                self._misses += 1
                future = self._pending[key] = Future[Embedding]()
            else:
                self._hits += 1
        if awaited is not None:
            return awaited.result(), True
        return self._compute(key, future, embedder, image_hwc, of_session), False

    def discard(self, content_hash: str) -> None:
        """Forget that image for every model."""
        with self._lock:
            for key in [key for key in self._entries if key[2] == content_hash]:
                del self._entries[key]

    def _compute(
        self, key: Key, future: Future[Embedding], embedder: Embedder, image_hwc: ImageHWC, of_session: bool
    ) -> Embedding:
        try:
            embedding = embedder.embed(image_hwc)
        except BaseException as error:  # the waiters must hear of it, whatever it is
            with self._lock:
                del self._pending[key]
            future.set_exception(error)
            raise
        with self._lock:
            del self._pending[key]
            self._keep(key, Entry(embedding, of_session))
        future.set_result(embedding)
        return embedding

    def _keep(self, key: Key, entry: Entry) -> None:
        """Put an entry last in line and make room on its device; under the lock."""
        if entry.embedding.nbytes > self._bytes_max:
            return
        self._entries[key] = entry
        self._entries.move_to_end(key)
        here = [other for other in self._entries if other[1] == key[1]]
        held = sum(self._entries[other].embedding.nbytes for other in here)
        # Tasks' entries go first, each group from the least recently used; sorting is stable.
        for other in sorted(here, key=lambda other: self._entries[other].of_session):
            if held <= self._bytes_max:
                return
            if other != key:
                held -= self._entries.pop(other).embedding.nbytes
