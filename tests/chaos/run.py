"""A run: episodes one after the other on one ground, each a plan of its own, and the report of them all."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

from chaos.episode import Episode
from chaos.ground import ground
from chaos.machine import play
from chaos.report import Report

SLOW_SECONDS = 10.0
"""A recovery that takes longer than this is told too."""


def run(folder: Path, seed: int, steps: int, seconds: float, show: Callable[[str], None]) -> Report:
    """Play episodes until `seconds` are over, at least one. The plan of episode n is that of seed + n."""
    report = Report(seed)
    began = time.monotonic()
    show(f"chaos, seed {seed} (again: make chaos ARGS='--seed {seed}')")
    with ground(folder) as made:
        while report.episodes == 0 or time.monotonic() - began < seconds:
            number = seed + report.episodes
            episodes: list[Episode] = []

            def make(dice: int, count: int, store: str) -> Episode:
                episodes.append(Episode(made, report, dice, count, store))  # noqa: B023 - called before the next turn
                show(f"episode {report.episodes + 1}, seed {number}: {count} daemons, blobs in {store}")  # noqa: B023
                return episodes[0]  # noqa: B023

            play(number, steps, make)
            report.episodes += 1
            report.seconds = time.monotonic() - began
            for episode in episodes:
                _tell(episode, number, report, show)
    return report


def _tell(episode: Episode, number: int, report: Report, show: Callable[[str], None]) -> None:
    """One line of an episode that went well, the stories of its rows when it did not."""
    show(f"  {len(episode.load.asked)} rows; {', '.join(name for name, _ in episode.faults.over)}")
    seconds, task, fault = episode.slowest
    if seconds > SLOW_SECONDS:
        show(f"  {seconds:.1f} s to recover after {fault}; the last row was {task}\n{episode.story(task)}")
    if episode.violations:
        report.violations += [violation.sentence for violation in episode.violations]
        show(f"  VIOLATED (seed {number}):\n{episode.stories()}")
