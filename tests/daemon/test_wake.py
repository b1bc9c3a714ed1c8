"""The bell: rings, polls, and looks in passing that are as good as polls."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import anyio
import pytest

from daemon import metrics
from daemon.wake import IDLE_STRETCH, Wake
from storage.base import Task

pytestmark = pytest.mark.anyio

NEVER = 1000.0
SOON = 20.0


class Source:
    """A source that is proven at once and notes what polls found."""

    name = "source_of_this_test"
    reasons: tuple[str, ...] = ("bored",)
    workers = 1

    def __init__(self) -> None:
        self.on_ended: Callable[[str], None] = lambda reason: None
        self.polled_ids: list[str] = []

    async def run(self, wake: Callable[[], None], proven: Callable[[bool], None]) -> None:
        proven(True)
        self.on_ended("bored")
        await anyio.Event().wait()

    def polled(self, tasks: Sequence[Task]) -> int:
        self.polled_ids += [task.id for task in tasks]
        return len(tasks)


def task(task_id: str) -> Task:
    return Task(task_id, "", "noop", "", None, None, None, "{}", 1, 3, 0, 0.0)


async def passes(wake: Wake, due: float | None = None) -> bool:
    """Whether `wait` returns before anything but what has happened already can end it."""
    with anyio.move_on_after(0.05) as waited:
        await wake.wait(due)
    return not waited.cancelled_caught


async def test_a_look_that_finds_nothing_ends_no_wait_and_one_that_finds_work_does() -> None:
    wake = Wake(NEVER, NEVER)
    wake.look(False)
    assert not await passes(wake)
    wake.look(True)
    assert await passes(wake)


async def test_waiting_is_a_sign_of_life_also_while_looks_find_nothing() -> None:
    wake = Wake(NEVER, NEVER)
    for _ in range(3):
        turns = wake.turns
        wake.look(False)
        assert not await passes(wake)
        assert wake.turns > turns + 1


async def test_a_hint_whose_turn_is_to_come_is_not_lost_to_a_look_that_finds_nothing() -> None:
    wake, source = Wake(NEVER, NEVER), Source()
    source.workers = 200
    wake.busy = lambda: True
    wake.hint(source)
    wake.look(False)
    with anyio.fail_after(SOON):
        await wake.wait(None)


async def test_a_ring_is_not_lost_to_a_look_that_finds_nothing() -> None:
    wake = Wake(NEVER, NEVER)
    for act in (lambda: (wake.look(False), wake.ring()), lambda: (wake.ring(), wake.look(False))):
        act()
        assert await passes(wake)


async def test_what_a_look_or_a_poll_led_to_is_told_to_the_sources_and_what_a_hint_led_to_is_not() -> None:
    wake, source = Wake(NEVER, NEVER), Source()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wake.run, source)
        with anyio.fail_after(SOON):
            while wake.mode != "push":
                await anyio.lowlevel.checkpoint()
        wake.forget()
        wake.look(True)
        await wake.wait(None)
        wake.found([task("a")])
        wake.ring("hint")
        await wake.wait(None)
        wake.found([task("b")])
        await wake.wait(0)
        wake.found([task("c")])
        tasks.cancel_scope.cancel()
    assert source.polled_ids == ["a"]
    assert metrics.WAKE_MISSED.labels(source.name)._value.get() == 1
    assert metrics.WAKE_ENDED.labels(source.name, "bored")._value.get() == 1


async def test_after_a_rest_polls_are_twice_as_far_apart_and_work_ends_it() -> None:
    wake, stirred = Wake(NEVER, 1.0, rest_seconds=60), []
    wake.on_work = lambda: stirred.append(True)
    wake._proven["source"] = True
    wake._last_work -= 61
    assert wake.is_idle()
    assert wake._interval() >= NEVER * 0.75 * IDLE_STRETCH
    wake.worked()
    assert not wake.is_idle()
    assert stirred == [True]
    assert wake._interval() <= NEVER * 1.25
