"""A check-up: independent checks, each within its time, each of one or a few lines. What `maskd doctor` shows.

Enters: checks. Leaves: one line per name, in order, whatever fails. Decides nothing about what is well.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import TypeVar

import anyio
import anyio.to_thread

Answer = TypeVar("Answer")


class State(StrEnum):
    """How it is: in order; works, with something to know; does not work."""

    OK = "ok"
    WARN = "warn"
    BAD = "bad"


@dataclass(frozen=True, slots=True)
class Line:
    """What was found: a short fact, and where not all is well one sentence that says what to do."""

    check: str
    state: State
    fact: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """Finds a line for each of `names`, in this order, within `seconds`."""

    names: tuple[str, ...]
    seconds: float
    find: Callable[[], Awaitable[Sequence[Line]]]


async def run(checks: Sequence[Check]) -> list[Line]:
    """All checks at once; their lines in the order of the checks."""
    found: dict[int, list[Line]] = {}

    async def one(place: int, check: Check) -> None:
        found[place] = await _lines(check)

    async with anyio.create_task_group() as tasks:
        for place, check in enumerate(checks):
            tasks.start_soon(one, place, check)
    return [line for place in range(len(checks)) for line in found[place]]


def not_looked_at(names: Sequence[str], because: str) -> list[Line]:
    """Lines for what could not be looked at."""
    return [Line(name, State.WARN, f"not looked at: {because}", "Mend that first, then ask again.") for name in names]


def by_name(names: Sequence[str], lines: Mapping[str, Line]) -> list[Line]:
    """The lines in the order of the names."""
    return [lines[name] for name in names]


async def in_thread(work: Callable[[], Answer]) -> Answer:
    """Run what blocks on a thread; past the check's time it is left behind."""
    return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)


async def _lines(check: Check) -> list[Line]:
    first, *rest = check.names
    try:
        with anyio.fail_after(check.seconds):
            return list(await check.find())
    except TimeoutError:
        said = Line(first, State.BAD, f"no answer within {check.seconds:g} s", "Look at what it depends on, and ask again.")
    except Exception as error:  # whatever a broken host comes up with: the other checks go on
        said = Line(first, State.BAD, f"{type(error).__name__}: {error}", "This check itself failed; what it asked is not known.")
    return [said, *not_looked_at(rest, f"{first} failed")]
