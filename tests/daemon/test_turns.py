"""Who looks when a hint comes: one worker at once, many in turns, the busy after the idle, and each once for many hints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import anyio
import pytest
from support.works import a_work

from daemon.claim import Claimer
from daemon.gate import Gate
from daemon.wake import AT_ONCE_MAX, SPREAD_SECONDS_MAX, TURN_SECONDS, YIELD_SECONDS, Wake, turn_seconds
from daemon.work import Held
from storage.base import TaskStore, WakeSource

pytestmark = pytest.mark.anyio

NEVER = 3600.0
MANY = 50


@dataclass
class Source:
    """What a bell knows of a source."""

    workers: int
    name: str = "test"


class Counted(Wake):
    """A bell that counts how often it rang."""

    rings = 0

    def ring(self, source: str = "inside") -> None:
        self.rings += 1
        super().ring(source)


def hint(wake: Wake, workers: int) -> None:
    wake.hint(cast(WakeSource, Source(workers)))


async def test_one_worker_looks_at_once_also_with_work_in_hand() -> None:
    wake = Counted(NEVER, NEVER)
    for busy in (False, True):
        wake.busy = lambda busy=busy: busy  # type: ignore[misc]
        before = wake.rings
        hint(wake, 1)
        assert wake.rings == before + 1


async def test_a_few_idle_workers_look_at_once() -> None:
    assert {turn_seconds(workers, busy=False) for workers in range(1, AT_ONCE_MAX + 1)} == {0.0}


async def test_many_idle_workers_spread_over_the_time_they_share() -> None:
    shared = TURN_SECONDS * (MANY - AT_ONCE_MAX)
    turns = sorted(turn_seconds(MANY, busy=False) for _ in range(1000))
    assert 0 <= turns[0] < shared / 10
    assert shared * 0.9 < turns[-1] <= shared


async def test_a_busy_worker_looks_after_every_idle_one() -> None:
    assert turn_seconds(2, busy=True) == YIELD_SECONDS
    assert min(turn_seconds(MANY, busy=True) for _ in range(1000)) >= max(turn_seconds(MANY, busy=False) for _ in range(1000))


async def test_the_wait_has_an_end_however_many_workers_there_are() -> None:
    assert max(turn_seconds(1_000_000, busy=True) for _ in range(1000)) <= 2 * SPREAD_SECONDS_MAX


async def test_hints_that_come_before_our_turn_are_answered_by_one_look_and_the_next_by_another() -> None:
    wake = Counted(NEVER, NEVER)
    for looks in (1, 2):
        for _ in range(100):
            hint(wake, 1000)
        with anyio.fail_after(20):
            await wake.wait(None)
        assert wake.rings == looks


async def test_a_look_answers_the_hints_before_it_and_nobody_looks_again_for_them() -> None:
    wake = Counted(NEVER, NEVER)
    hint(wake, 1000)
    assert wake.yields
    wake.forget()
    assert not wake.yields
    hint(wake, 1)
    assert wake.rings == 1


async def test_a_worker_with_nothing_left_looks_at_once_instead_of_letting_others_go_first() -> None:
    wake, held = Counted(NEVER, NEVER), Held()
    Claimer(cast(TaskStore, None), "worker", held, wake, Gate({}), 100)
    (one, other) = works = [a_work(), a_work()]
    held.add(works)
    wake.busy = lambda: len(held) > 0
    hint(wake, MANY)
    held.drop([one])
    assert wake.rings == 0
    held.drop([other])
    assert wake.rings == 1
