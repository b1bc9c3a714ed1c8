"""The figures of a run, and how they are printed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

MEANING = (
    "from a fault's end (of a kill: from the kill) until the last of the rows that workers held then has ended; faults overlap"
)


@dataclass(slots=True, eq=False)
class Report:
    """What happened. `recoveries` are in seconds, per fault that met rows in hand; `taken_back` counts rows claimed again."""

    seed: int
    episodes: int = 0
    seconds: float = 0.0
    ends: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    recoveries: list[tuple[str, float]] = field(default_factory=list)
    taken_back: int = 0
    violations: list[str] = field(default_factory=list)
    duplicates: int = 0
    lost: int = 0

    def told(self) -> str:
        """As a person wants to see it."""
        times = sorted(seconds for _, seconds in self.recoveries)
        faults = "  ".join(f"{name} {count}" for name, count in sorted(self.faults.items()))
        ended = "  ".join(f"{name} {count}" for name, count in sorted(self.ends.items()))
        worst = max(self.recoveries, key=lambda pair: pair[1], default=("none", 0.0))
        rows = sum(self.ends.values())
        return "\n".join(
            [
                f"rows        {rows:,} ({ended}), {self.taken_back} of them claimed more than once",
                f"faults      {sum(self.faults.values())} ({faults})",
                f"recovery    p50 {at(times, 0.5):.2f} s   p99 {at(times, 0.99):.2f} s   max {worst[1]:.2f} s ({worst[0]})",
                f"            n = {len(times)}: {MEANING}",
                f"duplicates  {self.duplicates}",
                f"lost        {self.lost}",
                f"violations  {len(self.violations)}",
                f"seed        {self.seed}, {self.episodes} episodes, {self.seconds:.0f} s",
            ]
        )


def at(times: Sequence[float], share: float) -> float:
    """The value that this share of a sorted series does not exceed; 0 of none."""
    return times[min(len(times) - 1, int(share * len(times)))] if times else 0.0
