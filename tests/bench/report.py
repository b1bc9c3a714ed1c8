"""What a benchmark says: figures of both sides with their noise, then ratios with their thresholds and verdicts."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class Report:
    """Prints as it goes; `missed` counts the thresholds that were not met."""

    missed: int = 0
    lines: list[str] = field(default_factory=list)

    def title(self, name: str, sentence: str) -> None:
        """Which benchmark, and what it compares."""
        self._say(f"\n{name}: {sentence}")

    def side(self, name: str, values: Sequence[float], unit: str) -> None:
        """One side's figure: the median of its rounds, and all of them as min..max."""
        noise = f"  ({_number(min(values))}..{_number(max(values))}, {len(values)} rounds)" if len(values) > 1 else ""
        self._say(f"  {name:<44} {_number(statistics.median(values)):>10} {unit}{noise}")

    def at_least(self, name: str, ratios: Sequence[float], least: float) -> None:
        """The median of the rounds' ratios must reach `least`."""
        self._judge(name, ratios, statistics.median(ratios) >= least, f"at least {least:g}")

    def at_most(self, name: str, ratios: Sequence[float], most: float) -> None:
        """The median of the rounds' ratios must not exceed `most`."""
        self._judge(name, ratios, statistics.median(ratios) <= most, f"at most {most:g}")

    def note(self, sentence: str) -> None:
        self._say(f"  {sentence}")

    def _judge(self, name: str, ratios: Sequence[float], met: bool, threshold: str) -> None:
        noise = f"  ({min(ratios):.2f}..{max(ratios):.2f})" if len(ratios) > 1 else ""
        self._say(f"  {name:<44} {statistics.median(ratios):>10.2f}  {threshold}: {'ok' if met else 'MISSED'}{noise}")
        self.missed += not met

    def _say(self, line: str) -> None:
        self.lines.append(line)
        print(line, flush=True)


def percentile(values: Sequence[float], percent: int) -> float:
    """The nearest-rank percentile."""
    return sorted(values)[max(0, -(-len(values) * percent // 100) - 1)]


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours by theirs, round by round: neighbours in time, so that a slow minute of the host cancels out."""
    return [mine / other for mine, other in zip(ours, theirs, strict=True)]


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3f}"
