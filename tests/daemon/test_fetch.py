"""The byte budget of images in flight: bounded, fair, and never stuck."""

from __future__ import annotations

import anyio
import pytest
from anyio.lowlevel import checkpoint

from daemon.fetch import Budget

pytestmark = pytest.mark.anyio


async def test_what_does_not_fit_waits_until_something_is_given_back() -> None:
    budget, got = Budget(100), []

    async def take(size: int) -> None:
        await budget.take(size)
        got.append(size)

    async with anyio.create_task_group() as tasks:
        await take(80)
        tasks.start_soon(take, 30)
        tasks.start_soon(take, 10)
        for _ in range(5):
            await checkpoint()
        assert got == [80], "the small one does not overtake the large one"
        budget.give(80)
    assert got == [80, 30, 10]


async def test_an_image_larger_than_the_budget_is_let_through_alone() -> None:
    budget = Budget(100)
    await budget.take(500)
    with anyio.move_on_after(0):
        await budget.take(1)
    budget.give(500)
    with anyio.fail_after(5):
        await budget.take(100)


async def test_one_that_gives_up_waiting_takes_nothing() -> None:
    budget = Budget(100)
    await budget.take(100)
    with anyio.move_on_after(0.01):
        await budget.take(50)
    budget.give(100)
    with anyio.fail_after(5):
        await budget.take(100)


async def test_who_holds_some_already_never_waits_for_more() -> None:
    budget = Budget(100)
    await budget.take(100)
    with anyio.fail_after(5):
        await budget.take(50, at_once=True)
    budget.give(150)
    with anyio.fail_after(5):
        await budget.take(100)
