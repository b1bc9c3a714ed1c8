"""The embedding cache: what is kept, what goes first, and who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest
from support.engines import cached

from models.base import Embedding, ImageHWC, View
from models.cache import SMALLS_MAX, EmbeddingCache

IMAGE = np.zeros((1, 1, 3), dtype=np.uint8)
WAIT_SECONDS = 10


def nothing() -> None:
    """What an embedder does that neither waits nor fails."""


@dataclass
class Counting:
    """An embedder that counts its calls, of embeddings of `nbytes`, and does `first` before it answers."""

    nbytes: int = 10
    model_id: str = "m"
    engine: str = "counting"
    device: str = "cpu"
    first: Callable[[], None] = nothing
    calls: list[int] = field(default_factory=list)
    shrunk: list[int] = field(default_factory=list)

    def shrink(self, image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> ImageHWC:
        self.shrunk.append(1)
        return image_hwc

    def embed(self, smalls: Sequence[ImageHWC]) -> list[Embedding]:
        self.calls.append(len(smalls))
        self.first()
        return [Embedding((1, 1), None, self.nbytes) for _ in smalls]


def test_the_second_question_is_answered_without_computing() -> None:
    cache, model = EmbeddingCache(100), Counting()
    first, second = cached(cache, model, "a", IMAGE), cached(cache, model, "a", IMAGE)
    assert (first[1], second[1], first[0] is second[0], len(model.calls)) == (False, True, True, 1)


def test_counters_tell_hits_misses_bytes_and_entries() -> None:
    cache, model = EmbeddingCache(100), Counting()
    for content_hash in "aab":
        cached(cache, model, content_hash, IMAGE)
    assert (cache.hits, cache.misses, cache.bytes, cache.entries) == (1, 2, 20, 2)


def test_models_and_devices_do_not_share_an_embedding() -> None:
    cache = EmbeddingCache(100)
    models = [Counting(), Counting(model_id="n"), Counting(device="cuda:0")]
    assert [cached(cache, model, "a", IMAGE)[1] for model in models] == [False, False, False]


def test_the_least_recently_used_goes_first() -> None:
    cache, model = EmbeddingCache(20), Counting()
    for content_hash in "abac":
        cached(cache, model, content_hash, IMAGE)
    assert [cached(cache, model, content_hash, IMAGE)[1] for content_hash in "acb"] == [True, True, False]


def test_each_device_has_the_whole_budget() -> None:
    cache, here, there = EmbeddingCache(10), Counting(), Counting(device="cuda:0")
    for model in (here, there):
        cached(cache, model, "a", IMAGE)
    assert [cached(cache, model, "a", IMAGE)[1] for model in (here, there)] == [True, True]


def test_embeddings_of_sessions_outlive_those_of_tasks() -> None:
    cache, model = EmbeddingCache(20), Counting()
    cached(cache, model, "session", IMAGE, of_session=True)
    for content_hash in "abc":
        cached(cache, model, content_hash, IMAGE)
    assert cached(cache, model, "session", IMAGE)[1]


def test_a_session_that_was_not_used_for_long_enough_outlives_nothing() -> None:
    now = [0.0]
    cache, model = EmbeddingCache(20, session_seconds=600, clock=lambda: now[0]), Counting()
    cached(cache, model, "session", IMAGE, of_session=True)
    now[0] = 599.0
    assert cache.kept(model, "session") is not None
    now[0] = 1198.0
    cached(cache, model, "task", IMAGE)
    cached(cache, model, "task 2", IMAGE)
    assert cache.kept(model, "session") is not None
    assert cache.kept(model, "task") is None
    now[0] = 1798.0
    for content_hash in "ab":
        cached(cache, model, content_hash, IMAGE)
    assert cache.kept(model, "session") is None


def test_an_embedding_larger_than_the_budget_is_given_but_not_kept() -> None:
    cache, small, large = EmbeddingCache(15), Counting(), Counting(nbytes=16)
    cached(cache, small, "a", IMAGE)
    assert cached(cache, large, "b", IMAGE)[0].nbytes == 16
    assert (cache.entries, cached(cache, small, "a", IMAGE)[1]) == (1, True)


def test_a_budget_of_nothing_keeps_nothing() -> None:
    cache, model = EmbeddingCache(0), Counting()
    assert [cached(cache, model, "a", IMAGE)[1] for _ in range(2)] == [False, False]


def test_an_image_can_be_forgotten() -> None:
    cache, model = EmbeddingCache(100), Counting()
    cached(cache, model, "a", IMAGE)
    cache.discard("a")
    assert (cache.entries, cached(cache, model, "a", IMAGE)[1]) == (0, False)


def test_threads_that_ask_for_the_same_image_compute_it_once() -> None:
    # Whoever computes waits until all others have asked: a second computation would break the barrier's count.
    cache = EmbeddingCache(100)
    model = Counting(first=lambda: until(lambda: cache.hits == 3))
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: cached(cache, model, "a", IMAGE), range(4)))
    assert (len(model.calls), sorted(cached for _, cached in answers)) == (1, [False, True, True, True])


def test_another_image_does_not_wait_for_one_under_way() -> None:
    cache, begun, go_on = EmbeddingCache(100), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(WAIT_SECONDS)

    slow = Counting(first=wait)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(cached, cache, slow, "a", IMAGE)
        assert begun.wait(WAIT_SECONDS)
        cached(cache, Counting(), "b", IMAGE)
        assert not waiting.done()
        go_on.set()
        assert waiting.result(WAIT_SECONDS)[1] is False


def test_a_failure_reaches_all_who_wait_and_leaves_nothing_behind() -> None:
    cache = EmbeddingCache(100)

    def fail() -> None:
        until(lambda: cache.hits == 2)
        raise ValueError("no memory")

    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(cached, cache, Counting(first=fail), "a", IMAGE) for _ in range(3)]
        errors = [future.exception(WAIT_SECONDS) for future in asked]
    assert [str(error) for error in errors] == ["no memory"] * 3
    assert (cache.entries, cached(cache, Counting(), "a", IMAGE)[1]) == (0, False)


def test_a_failure_is_the_askers_own_exception() -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        cached(EmbeddingCache(100), Counting(first=fail), "a", IMAGE)


def until(holds: Callable[[], bool]) -> None:
    """Give other threads turns until something holds; the test fails when it never does."""
    turn = threading.Event()
    for _ in range(WAIT_SECONDS * 1000):
        if holds():
            return
        turn.wait(0.001)
    raise AssertionError("it never came to hold")


def test_images_that_come_together_are_computed_in_one_call_and_each_once() -> None:
    cache, model = EmbeddingCache(100), Counting()
    cached(cache, model, "a", IMAGE)
    answers = cache.get(model, [View(content_hash, IMAGE) for content_hash in "abcb"])
    assert ([known for _, known in answers], model.calls) == ([True, False, False, True], [1, 2])
    assert answers[1][0] is answers[3][0]


def test_an_image_is_shrunk_once_for_all_that_wait_for_it_and_not_at_all_when_it_is_known() -> None:
    cache, model = EmbeddingCache(100), Counting()
    views = [cache.view(model, content_hash, IMAGE) for content_hash in "aab"]
    assert (len(model.shrunk), views[0].small is views[1].small) == (2, True)
    cache.get(model, views)
    assert cache.view(model, "a", IMAGE).small is None
    assert len(model.shrunk) == 2


def test_what_was_evicted_since_it_was_looked_at_is_shrunk_after_all() -> None:
    cache, model = EmbeddingCache(10), Counting()
    cached(cache, model, "a", IMAGE)
    view = cache.view(model, "a", IMAGE)
    cached(cache, model, "b", IMAGE)
    assert (view.small, cache.get(model, [view])[0][1], len(model.shrunk)) == (None, False, 3)


def test_shrunk_images_that_nobody_asks_for_again_are_few() -> None:
    cache, model = EmbeddingCache(100), Counting()
    for number in range(SMALLS_MAX + 1):
        cache.view(model, str(number), IMAGE)
    cache.view(model, str(SMALLS_MAX), IMAGE)
    assert len(model.shrunk) == SMALLS_MAX + 1
    cache.view(model, "0", IMAGE)
    assert len(model.shrunk) == SMALLS_MAX + 2


def test_a_failure_of_another_image_is_not_ones_own() -> None:
    cache, waiting = EmbeddingCache(100), threading.Event()

    class Picky(Counting):
        """Fails whenever more than one image comes, once somebody waits for one of them."""

        def embed(self, smalls: Sequence[ImageHWC]) -> list[Embedding]:
            if len(smalls) > 1:
                waiting.set()
                until(lambda: cache.hits == 1)
                raise ValueError("the first is bad")
            return super().embed(smalls)

    with ThreadPoolExecutor(2) as threads:
        both = threads.submit(cache.get, Picky(), [View("bad", IMAGE), View("good", IMAGE)])
        assert waiting.wait(WAIT_SECONDS)
        alone = threads.submit(cached, cache, Picky(), "good", IMAGE)
        assert str(both.exception(WAIT_SECONDS)) == "the first is bad"
        assert alone.result(WAIT_SECONDS)[0].nbytes == 10


def test_an_engine_that_answers_too_little_leaves_nobody_waiting() -> None:
    class Short(Counting):
        def embed(self, smalls: Sequence[ImageHWC]) -> list[Embedding]:
            return super().embed(smalls)[1:]

    cache = EmbeddingCache(100)
    with pytest.raises(RuntimeError, match="made 0 embeddings of 1 images"):
        cached(cache, Short(), "a", IMAGE)
    assert cached(cache, Counting(), "a", IMAGE)[1] is False


def test_what_a_session_asks_for_while_a_task_embeds_it_is_the_sessions() -> None:
    cache = EmbeddingCache(20)
    slow = Counting(first=lambda: until(lambda: cache.hits == 1))
    with ThreadPoolExecutor(2) as threads:
        task = threads.submit(cached, cache, slow, "a", IMAGE)
        until(lambda: cache.misses == 1)
        cached(cache, slow, "a", IMAGE, of_session=True)
        task.result(WAIT_SECONDS)
    for content_hash in "bcd":
        cached(cache, Counting(), content_hash, IMAGE)
    assert cached(cache, Counting(), "a", IMAGE)[1]
