"""Stalls: which parts of the daemon have something to do and do not get on. Pure: told what it sees, and when.

Enters: a sign of life per part, looked at now and then. Leaves: the parts that stand still, for which the watchdog starves.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping

Sign = Hashable | None
"""None while a part needs nothing, or waits for what has an end of its own; else something that changes with its every step."""


class Stalls:
    """Remembers since when each part has shown the same sign."""

    def __init__(self) -> None:
        self._since: dict[str, tuple[Sign, float]] = {}

    def look(self, now: float, signs: Mapping[str, Sign], seconds_max: Mapping[str, float]) -> list[str]:
        """The parts whose sign has been the same for longer than they may take."""
        for part, sign in signs.items():
            if part not in self._since or self._since[part][0] != sign:
                self._since[part] = sign, now
        return [part for part, sign in signs.items() if sign is not None and now - self._since[part][1] > seconds_max[part]]
