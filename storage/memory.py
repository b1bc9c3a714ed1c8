"""SessionStore in the memory of this process: for one daemon, or several of which each user meets one only.

Enters: parts as bytes. Leaves: the same. All sessions live equally long, so the first in line is the first to go.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from storage.base import SessionsFullError


@dataclass(slots=True)
class Entry:
    """A live session."""

    parts: dict[str, bytes]
    until: float


class MemorySessions:
    """`clock` gives seconds that never run backwards."""

    name = "memory"

    def __init__(
        self, ttl_seconds: float, sessions_max: int, bytes_max: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ttl = ttl_seconds
        self._sessions_max = sessions_max
        self._bytes_max = bytes_max
        self._clock = clock
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._bytes = 0

    async def open(self) -> None:
        """Nothing to connect to."""

    async def close(self) -> None:
        """Nothing to let go of."""

    async def create(self, session_id: str, parts: Mapping[str, bytes]) -> None:
        self._sweep()
        size = sum(map(len, parts.values()))
        if len(self._entries) >= self._sessions_max:
            raise self._full()
        self._make_room(size)
        self._entries[session_id] = Entry(dict(parts), self._clock() + self._ttl)

    async def read(self, session_id: str, part: str) -> bytes | None:
        entry = self._used(session_id)
        return None if entry is None else entry.parts.get(part)

    async def write(self, session_id: str, part: str, data: bytes) -> bool:
        entry = self._used(session_id)
        if entry is None:
            return False
        self._make_room(len(data) - len(entry.parts.get(part, b"")))
        entry.parts[part] = data
        return True

    async def drop(self, session_id: str) -> bool:
        self._sweep()
        return self._remove(session_id)

    async def drop_all(self) -> int:
        self._sweep()
        ids = list(self._entries)
        return sum(self._remove(session_id) for session_id in ids)

    async def count(self) -> tuple[int, int]:
        self._sweep()
        return len(self._entries), self._bytes

    def _used(self, session_id: str) -> Entry | None:
        self._sweep()
        entry = self._entries.get(session_id)
        if entry is not None:
            entry.until = self._clock() + self._ttl
            self._entries.move_to_end(session_id)
        return entry

    def _make_room(self, size: int) -> None:
        if size > 0 and self._bytes + size > self._bytes_max:
            raise self._full()
        self._bytes += size

    def _full(self) -> SessionsFullError:
        first = next(iter(self._entries.values()), None)
        return SessionsFullError(self._ttl if first is None else max(first.until - self._clock(), 0.0))

    def _sweep(self) -> None:
        now = self._clock()
        while self._entries:
            first = next(iter(self._entries))
            if self._entries[first].until > now:
                return
            self._remove(first)

    def _remove(self, session_id: str) -> bool:
        entry = self._entries.pop(session_id, None)
        if entry is not None:
            self._bytes -= sum(map(len, entry.parts.values()))
        return entry is not None
