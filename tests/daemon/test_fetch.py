"""Fetching: loads bounded in time, a byte budget that is fair and never stuck, nothing kept for works that have left."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest
from anyio.lowlevel import checkpoint
from support.pictures import flag, saved
from support.works import a_task, handler

from daemon.fetch import Budget, Fetcher, FetchLimits
from daemon.infer import TimedOutError
from daemon.keys import Keys
from daemon.work import Work
from handlers.base import Inputs, Limits
from storage import images
from storage.base import BlobStore, TaskStore, UnavailableError

pytestmark = pytest.mark.anyio

IMAGES = handler(parse=lambda request, limits: None, inputs=lambda params: Inputs(source=True))


class SlowBlobs:
    """Answers with an image once `go` is set; `asked` says that somebody waits."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.asked = threading.Event()
        self.go = threading.Event()
        self.count = 0

    def get(self, key: str, bytes_max: int) -> bytes:
        self.count += 1
        self.asked.set()
        assert self.go.wait(30)
        return self.data


class Fetching:
    """A fetcher over `SlowBlobs`, and what came out of it."""

    def __init__(self, timeout_seconds: float, data: bytes | None = None) -> None:
        self.blobs = SlowBlobs(saved(flag(), "PNG") if data is None else data)
        limits = FetchLimits(10**6, 10**6, 10**6, io_threads=4, decode_threads=1, timeout_seconds=timeout_seconds)
        store = cast(TaskStore, SimpleNamespace())
        asks = Limits(1000, 256, 64, 64, 100)
        self.fetcher = Fetcher(cast(BlobStore, self.blobs), store, Keys([], None), ["images/"], limits, asks)
        self.ready: list[Work] = []
        self.failed: list[tuple[Work, Exception]] = []
        self.fetcher.ready = self._take
        self.fetcher.fail = lambda work, error: self.failed.append((work, error))

    def _take(self, works: Sequence[Work]) -> None:
        self.ready.extend(works)


def wants_image(name: str = "a.png", **changes: Any) -> Work:
    return Work(a_task(source_image_url=f"images/{name}", **changes), IMAGES, "cpu")


async def test_a_download_past_its_time_limit_releases_every_work_that_waits_for_it() -> None:
    fetching, works = Fetching(timeout_seconds=0.05), [wants_image(), wants_image()]
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            fetching.fetcher.admit(tasks, works)
    fetching.blobs.go.set()
    assert [work for work, _ in fetching.failed] == works
    assert {type(error) for _, error in fetching.failed} == {UnavailableError}, "a store that hangs is nobody's fault"
    assert fetching.blobs.count == 1


async def test_waiting_for_room_counts_towards_no_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    fetching, deadlines = Fetching(timeout_seconds=20), []

    async def take(size: int, at_once: bool = False) -> None:
        deadlines.append(anyio.current_effective_deadline())

    monkeypatch.setattr(fetching.fetcher._budget, "take", take)
    fetching.blobs.go.set()
    async with anyio.create_task_group() as tasks:
        fetching.fetcher.admit(tasks, [wants_image()])
    assert (len(fetching.ready), deadlines) == (1, [math.inf])


async def test_a_transparent_image_comes_with_its_alpha_which_counts_as_bytes_too() -> None:
    image = flag().convert("RGBA")
    image.putpixel((0, 0), (0, 0, 0, 0))
    data, work = saved(image, "PNG"), wants_image()
    fetching = Fetching(timeout_seconds=20, data=data)
    fetching.blobs.go.set()
    async with anyio.create_task_group() as tasks:
        fetching.fetcher.admit(tasks, [work])
    assert fetching.fetcher._budget._used == len(data) + 48 * 32 * 4
    source = work.job.image if work.job else None
    assert source is not None
    assert source.alpha_hw is not None
    assert (source.alpha_hw[0, 0], source.alpha_hw[0, 1], source.format, source.icc_profile) == (0, 255, "PNG", None)
    fetching.fetcher.leave([work])
    assert fetching.fetcher._budget._used == 0


async def test_a_decoding_past_its_time_limit_ends_its_work_and_gives_its_room_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fetching, work, go = Fetching(timeout_seconds=0.5), wants_image(), threading.Event()
    fetching.blobs.go.set()
    monkeypatch.setattr(images, "decode", lambda data, **limits: go.wait(30))
    async with anyio.create_task_group() as tasks:
        fetching.fetcher.admit(tasks, [work])
    go.set()
    fetching.fetcher.leave([work])
    assert isinstance(fetching.failed[0][1], TimedOutError)
    assert fetching.fetcher._budget._used == 0


async def test_a_work_that_leaves_in_the_middle_of_fetching_ends_silently_and_keeps_nothing() -> None:
    fetching, work = Fetching(timeout_seconds=20), wants_image()
    async with anyio.create_task_group() as tasks:
        fetching.fetcher.admit(tasks, [work])
        await anyio.to_thread.run_sync(fetching.blobs.asked.wait, 20)
        work.settling = True
        fetching.fetcher.leave([work])
        fetching.blobs.go.set()
    assert (fetching.ready, fetching.failed) == ([], [])
    assert (fetching.fetcher._used, fetching.fetcher._shared, fetching.fetcher._budget._used) == ({}, {}, 0)


async def test_a_work_that_has_left_takes_no_image() -> None:
    fetching, work = Fetching(timeout_seconds=20), wants_image()
    work.settling = True
    async with anyio.create_task_group() as tasks:
        fetching.fetcher.admit(tasks, [work])
    assert (fetching.ready, fetching.failed, fetching.fetcher._used, fetching.blobs.count) == ([], [], {}, 0)


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
