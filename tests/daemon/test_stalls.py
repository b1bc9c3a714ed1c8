"""When a part counts as standing still: it shows the same sign for too long. None is no sign of anything wrong."""

from __future__ import annotations

import threading
from collections.abc import Callable

import anyio
import anyio.lowlevel
import pytest
from support.works import a_work, handler

from daemon.infer import Pool
from daemon.journal import Journal
from daemon.stalls import Sign, Stalls
from models.base import Models
from models.cache import EmbeddingCache


def stalled(*seen: tuple[float, Sign]) -> list[bool]:
    """Whether it stands still at each look, at most five seconds being allowed."""
    stalls = Stalls()
    return [stalls.look(at, {"claims": sign}, {"claims": 5.0}) == ["claims"] for at, sign in seen]


def test_the_same_sign_for_longer_than_allowed_is_a_stall_and_the_next_step_ends_it() -> None:
    assert stalled((0, 1), (4, 1), (6, 1), (7, 2), (11, 2), (13, 2)) == [False, False, True, False, False, True]


def test_who_needs_nothing_does_not_stand_still_and_starts_anew_afterwards() -> None:
    assert stalled((0, 1), (4, None), (100, None), (101, 1), (105, 1)) == [False] * 5


@pytest.mark.anyio
async def test_a_pool_shows_a_sign_only_while_something_waits_that_no_thread_is_at() -> None:
    go, began = threading.Event(), threading.Event()

    def run(prepared: list[object], models: Models, stop: object) -> list[object]:
        began.set()
        go.wait(20)
        return prepared

    steps = {"prepare": lambda job, models: job, "run": run, "finish": lambda job, raw: raw}
    kind = handler(ROLES=frozenset(), BATCH_MAX=1, TIMEOUT_FACTOR=1.0, **steps)
    pool = Pool(
        "cpu", Models(EmbeddingCache(0)), {"k": kind},
        threads=1, prefetch_batches=2, sizes={"k": 1}, timeout_seconds=30, journal=Journal(None, "w", "db"),
    )  # fmt: skip
    answered: list[object] = []
    pool.on_answers = lambda works, answers: answered.extend(works)
    hung = threading.Event()
    pool._threads.submit(hung.wait, answered.append)  # a thread that hangs in nothing that has a limit
    assert pool.sign() is None, "nothing waits"

    works = [a_work("k"), a_work("k")]
    for work in works:
        work.handler = kind
    pool.put(works)
    assert pool.sign() == 0
    hung.set()
    await until(began.is_set)
    await until(lambda: pool.sign() is None)  # one runs in its time, and the other waits for it
    go.set()
    await until(lambda: len(answered) == 3)
    assert pool.sign() is None


async def until(condition: Callable[[], bool]) -> None:
    with anyio.fail_after(20):
        while not condition():
            await anyio.lowlevel.checkpoint()
