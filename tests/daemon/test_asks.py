"""Asks of sessions in a pool: before batches, between their steps, and never lost for them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import pytest
from support.works import a_task, handler

from daemon.asks import BusyError, SupersededError
from daemon.infer import DeviceDiedError, Pool, PoolDiedError
from daemon.journal import Journal
from daemon.lanes import Lane, Threads
from daemon.work import Work
from handlers.base import Inputs, Job, Result
from models.base import DeviceLostError, Models, Stop
from models.cache import EmbeddingCache

pytestmark = pytest.mark.anyio
NO_ROLES: frozenset[Any] = frozenset()


class Line:
    """A pool of one thread, what ran on it in which order, and a call that holds it."""

    def __init__(self, run: Callable[..., Any] | None = None, aside: Threads | None = None, **changes: Any) -> None:
        self.order: list[Any] = []
        self.go_on, self.begun = threading.Event(), threading.Event()
        self.done, self.dead = anyio.Event(), anyio.Event()
        self.died_of: PoolDiedError | None = None
        self.kind = handler(
            ROLES=NO_ROLES,
            BATCH_MAX=1,
            TIMEOUT_FACTOR=1.0,
            parse=lambda request, limits: None,
            inputs=lambda params: Inputs(source=False),
            prepare=lambda job, models: job.params,
            run=run or (lambda items, models, stop: [self.order.append(item) for item in items]),
            finish=lambda job, raw: Result(),
        )
        values: dict[str, Any] = {"timeout_seconds": 60.0, "asks_max": 8}
        self.pool = Pool(
            "cpu",
            Models(EmbeddingCache(0)),
            {"k": self.kind},
            threads=1,
            prefetch_batches=1,
            sizes={"k": 1},
            journal=Journal(None, "w", "db"),
            aside=aside,
            **values | changes,
        )
        self.pool.on_answers = lambda works, answers: self.done.set() if works[-1].params == "last" else None
        self.pool.on_dead = self._died

    def _died(self, error: PoolDiedError) -> None:
        self.died_of = error
        self.dead.set()

    def hold(self, stop: Stop) -> None:
        self.begun.set()
        self.go_on.wait(20)

    def put(self, *params: str) -> list[Work]:
        works = [Work(a_task("k"), self.kind, "cpu", params=each, job=Job("t", each)) for each in params]
        self.pool.put(works)
        return works

    async def ask(self, name: Any, lane: Lane = Lane.CLICK, key: Any = None, seconds: float = 20.0) -> Any:
        return await self.pool.ask(NO_ROLES, lambda stop: self.order.append(name) or name, seconds, lane, key)

    async def held(self, tasks: Any) -> None:
        """Return when the thread is held."""
        tasks.start_soon(self.pool.ask, NO_ROLES, self.hold, 60.0)
        await anyio.to_thread.run_sync(self.begun.wait, 20)

    async def waiting(self, count: int) -> None:
        with anyio.fail_after(10):
            while sum(map(len, self.pool._threads._lanes)) < count:
                await anyio.lowlevel.checkpoint()


@pytest.mark.parametrize("with_device", [False, True], ids=["cpu", "gpu"])
async def test_clicks_go_before_everything_and_that_before_all_batches(with_device: bool) -> None:
    line = Line(aside=Threads("aside", 1) if with_device else None)
    async with anyio.create_task_group() as tasks:
        await line.held(tasks)
        works = line.put("batch", "last")
        ready = 1 if with_device else 0  # a device's next batch is prepared while its thread is busy
        await line.waiting(ready)
        for number, (name, lane) in enumerate((("everything", Lane.SOON), ("first", Lane.CLICK), ("second", Lane.CLICK))):
            tasks.start_soon(line.ask, name, lane)
            await line.waiting(ready + number + 1)
        assert sum(work.begun for work in works) == ready, "the time limit of what has not begun does not run"
        line.go_on.set()
        await line.done.wait()
    assert line.order == ["first", "second", "everything", "batch", "last"]


async def test_a_click_is_answered_between_the_steps_of_a_batch() -> None:
    stepping, step = threading.Event(), threading.Event()

    def run(items: Sequence[Any], models: Any, stop: Stop) -> list[Any]:
        stepping.set()
        step.wait(20)
        stop()
        line.order.append("batch")
        return list(items)

    line = Line(run)
    async with anyio.create_task_group() as tasks:
        line.put("last")
        await anyio.to_thread.run_sync(stepping.wait, 20)
        tasks.start_soon(line.ask, "click")
        tasks.start_soon(line.ask, "everything", Lane.SOON)
        await line.waiting(2)
        step.set()
        await line.done.wait()
    assert line.order == ["click", "batch", "everything"]


async def test_a_batch_that_goes_on_step_by_step_past_its_limit_times_out() -> None:
    def run(items: Sequence[Any], models: Any, stop: Stop) -> list[Any]:
        while True:
            stop()

    line = Line(run, timeout_seconds=0.05)
    with anyio.fail_after(10):
        line.put("last")
        await line.done.wait()
        await line.dead.wait()


async def test_the_time_of_clicks_is_not_that_of_the_batch_between_whose_steps_they_are_answered() -> None:
    stepping, step, ended = threading.Event(), threading.Event(), threading.Event()

    def run(items: Sequence[Any], models: Any, stop: Stop) -> list[Any]:
        stepping.set()
        step.wait(20)
        stop()
        ended.wait(20)
        return list(items)

    line = Line(run, timeout_seconds=0.3)
    answers: list[Any] = []
    line.pool.on_answers = lambda works, given: (answers.extend(given), line.done.set())
    async with anyio.create_task_group() as tasks:
        line.put("last")
        await anyio.to_thread.run_sync(stepping.wait, 20)
        limit_over = threading.Event()
        asyncio.get_running_loop().call_later(0.35, limit_over.set)

        def click(stop: Stop) -> None:
            """Takes until after the batch's limit."""
            limit_over.wait(20)

        tasks.start_soon(line.pool.ask, NO_ROLES, click, 20.0)
        await line.waiting(1)
        step.set()
        with anyio.fail_after(10):
            while line.pool._asks:
                await anyio.lowlevel.checkpoint()
        assert not answers
        ended.set()
        await line.done.wait()
    assert [type(answer) for answer in answers] == [Result]


async def test_what_an_ask_raises_is_raised_to_who_asks_and_the_pool_goes_on() -> None:
    line = Line()

    def fail(stop: Stop) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await line.pool.ask(NO_ROLES, fail, 20.0)
    assert await line.ask("next") == "next"
    assert len(line.pool._asks) == 0


async def test_a_newer_ask_takes_the_place_of_one_that_waits_but_not_of_one_that_runs() -> None:
    line = Line()
    superseded: list[str] = []

    async def ask(name: str) -> None:
        try:
            await line.ask(name, key="word")
        except SupersededError:
            superseded.append(name)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(line.pool.ask, NO_ROLES, line.hold, 60.0, Lane.CLICK, "word")
        await anyio.to_thread.run_sync(line.begun.wait, 20)
        for number, name in enumerate(("old", "new")):
            tasks.start_soon(ask, name)
            await line.waiting(number + 1)
        line.go_on.set()
    assert (line.order, superseded) == (["new"], ["old"])


async def test_what_is_given_up_lets_go_of_what_it_holds_and_of_its_place() -> None:
    line = Line(asks_max=1)
    async with anyio.create_task_group() as tasks:
        await line.held(tasks)
        with pytest.raises(TimeoutError):
            await line.ask("late", seconds=0.05)
        async with anyio.create_task_group() as gone:
            gone.start_soon(line.ask, "gone")
            await line.waiting(2)
            with pytest.raises(BusyError):
                await line.ask("too many")
            gone.cancel_scope.cancel()
        assert [call.__self__.call for call, *_ in line.pool._threads._lanes[Lane.CLICK]] == [None, None]
        line.go_on.set()
    assert await line.ask("next") == "next"
    assert line.order == ["next"]


async def test_an_ask_that_hangs_costs_its_thread_until_it_returns() -> None:
    line = Line(timeout_seconds=0.05)
    with pytest.raises(TimeoutError):
        await line.pool.ask(NO_ROLES, line.hold, 0.05)
    with anyio.fail_after(10):
        await line.dead.wait()
    assert (line.pool.lost, type(line.died_of)) == (1, PoolDiedError)
    line.go_on.set()
    with anyio.fail_after(10):
        while line.pool.lost:
            await anyio.lowlevel.checkpoint()


async def test_a_device_that_is_lost_in_an_ask_ends_the_pool() -> None:
    line = Line()

    def fail(stop: Stop) -> None:
        raise DeviceLostError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(DeviceLostError):
        await line.pool.ask(NO_ROLES, fail, 20.0)
    assert isinstance(line.died_of, DeviceDiedError)


async def test_a_panic_in_a_click_is_its_own_and_spares_the_batch_that_lent_its_thread() -> None:
    asked = threading.Event()

    def run(items: Sequence[Any], models: Models, stop: Stop) -> list[Any]:
        line.begun.set()
        asked.wait(20)
        stop()
        return list(items)

    class Panic(BaseException):
        pass

    def panic(stop: Stop) -> None:
        raise Panic("index out of bounds")

    line = Line(run)
    line.put("last")
    await anyio.to_thread.run_sync(line.begun.wait, 20)
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            with pytest.raises(RuntimeError, match="Panic"):
                await line.pool.ask(NO_ROLES, panic, 20.0)

        tasks.start_soon(ask)
        await line.waiting(1)
        asked.set()
    with anyio.fail_after(10):
        await line.done.wait()
    assert await line.ask("next") == "next"


async def test_a_click_that_hangs_between_steps_costs_its_thread_once_and_the_row_is_not_held_for_ever() -> None:
    asked = threading.Event()
    answers: list[Any] = []

    def run(items: Sequence[Any], models: Models, stop: Stop) -> list[Any]:
        if items == ["host"]:
            line.begun.set()
            asked.wait(20)
            stop()
        return list(items)

    line = Line(run, timeout_seconds=0.2)
    line.pool.on_answers = lambda works, given: answers.extend(given)
    line.put("host")
    await anyio.to_thread.run_sync(line.begun.wait, 20)
    async with anyio.create_task_group() as tasks:

        async def ask() -> None:
            with pytest.raises(TimeoutError):
                await line.pool.ask(NO_ROLES, lambda stop: line.go_on.wait(20), 0.2)

        tasks.start_soon(ask)
        await line.waiting(1)
        asked.set()
    with anyio.fail_after(10):
        await line.dead.wait()
        while not answers:
            await anyio.lowlevel.checkpoint()
    assert (line.pool.lost, type(answers[0]).__name__) == (1, "TimedOutError")
    line.go_on.set()
    with anyio.fail_after(10):
        while line.pool.lost:
            await anyio.lowlevel.checkpoint()


async def test_of_two_requests_the_one_that_came_later_counts_however_long_it_takes_to_ask() -> None:
    line = Line()
    with line.pool.arrived("word") as older, line.pool.arrived("word") as newer:
        with pytest.raises(SupersededError):
            await line.pool.ask(NO_ROLES, lambda stop: "old", 20.0, Lane.CLICK, "word", older)
        assert await line.pool.ask(NO_ROLES, lambda stop: "new", 20.0, Lane.CLICK, "word", newer) == "new"
    assert await line.ask("next", key="word") == "next"
