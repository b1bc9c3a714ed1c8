"""The embedding cache: what is kept, what goes first, and who waits for whom."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pytest

from models.base import Embedding, ImageHWC
from models.cache import EmbeddingCache

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

    def embed(self, image_hwc: ImageHWC) -> Embedding:
        self.calls.append(1)
        self.first()
        return Embedding((1, 1), None, self.nbytes)


def test_the_second_question_is_answered_without_computing() -> None:
    cache, model = EmbeddingCache(100), Counting()
    first, second = cache.get(model, "a", IMAGE), cache.get(model, "a", IMAGE)
    assert (first[1], second[1], first[0] is second[0], len(model.calls)) == (False, True, True, 1)


def test_counters_tell_hits_misses_bytes_and_entries() -> None:
    cache, model = EmbeddingCache(100), Counting()
    for content_hash in "aab":
        cache.get(model, content_hash, IMAGE)
    assert (cache.hits, cache.misses, cache.bytes, cache.entries) == (1, 2, 20, 2)


def test_models_and_devices_do_not_share_an_embedding() -> None:
    cache = EmbeddingCache(100)
    models = [Counting(), Counting(model_id="n"), Counting(device="cuda:0")]
    assert [cache.get(model, "a", IMAGE)[1] for model in models] == [False, False, False]


def test_the_least_recently_used_goes_first() -> None:
    cache, model = EmbeddingCache(20), Counting()
    for content_hash in "abac":
        cache.get(model, content_hash, IMAGE)
    assert [cache.get(model, content_hash, IMAGE)[1] for content_hash in "acb"] == [True, True, False]


def test_each_device_has_the_whole_budget() -> None:
    cache, here, there = EmbeddingCache(10), Counting(), Counting(device="cuda:0")
    for model in (here, there):
        cache.get(model, "a", IMAGE)
    assert [cache.get(model, "a", IMAGE)[1] for model in (here, there)] == [True, True]


def test_embeddings_of_sessions_outlive_those_of_tasks() -> None:
    cache, model = EmbeddingCache(20), Counting()
    cache.get(model, "session", IMAGE, of_session=True)
    for content_hash in "abc":
        cache.get(model, content_hash, IMAGE)
    assert cache.get(model, "session", IMAGE)[1]


def test_an_embedding_larger_than_the_budget_is_given_but_not_kept() -> None:
    cache, small, large = EmbeddingCache(15), Counting(), Counting(nbytes=16)
    cache.get(small, "a", IMAGE)
    assert cache.get(large, "b", IMAGE)[0].nbytes == 16
    assert (cache.entries, cache.get(small, "a", IMAGE)[1]) == (1, True)


def test_a_budget_of_nothing_keeps_nothing() -> None:
    cache, model = EmbeddingCache(0), Counting()
    assert [cache.get(model, "a", IMAGE)[1] for _ in range(2)] == [False, False]


def test_an_image_can_be_forgotten() -> None:
    cache, model = EmbeddingCache(100), Counting()
    cache.get(model, "a", IMAGE)
    cache.discard("a")
    assert (cache.entries, cache.get(model, "a", IMAGE)[1]) == (0, False)


def test_threads_that_ask_for_the_same_image_compute_it_once() -> None:
    # Whoever computes waits until all others have asked: a second computation would break the barrier's count.
    cache = EmbeddingCache(100)
    model = Counting(first=lambda: until(lambda: cache.hits == 3))
    with ThreadPoolExecutor(4) as threads:
        answers = list(threads.map(lambda _: cache.get(model, "a", IMAGE), range(4)))
    assert (len(model.calls), sorted(cached for _, cached in answers)) == (1, [False, True, True, True])


def test_another_image_does_not_wait_for_one_under_way() -> None:
    cache, begun, go_on = EmbeddingCache(100), threading.Event(), threading.Event()

    def wait() -> None:
        begun.set()
        assert go_on.wait(WAIT_SECONDS)

    slow = Counting(first=wait)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(cache.get, slow, "a", IMAGE)
        assert begun.wait(WAIT_SECONDS)
        cache.get(Counting(), "b", IMAGE)
        assert not waiting.done()
        go_on.set()
        assert waiting.result(WAIT_SECONDS)[1] is False


def test_a_failure_reaches_all_who_wait_and_leaves_nothing_behind() -> None:
    cache = EmbeddingCache(100)

    def fail() -> None:
        until(lambda: cache.hits == 2)
        raise ValueError("no memory")

    with ThreadPoolExecutor(3) as threads:
        asked = [threads.submit(cache.get, Counting(first=fail), "a", IMAGE) for _ in range(3)]
        errors = [future.exception(WAIT_SECONDS) for future in asked]
    assert [str(error) for error in errors] == ["no memory"] * 3
    assert (cache.entries, cache.get(Counting(), "a", IMAGE)[1]) == (0, False)


def test_a_failure_is_the_askers_own_exception() -> None:
    def fail() -> None:
        raise MemoryError

    with pytest.raises(MemoryError):
        EmbeddingCache(100).get(Counting(first=fail), "a", IMAGE)


def until(holds: Callable[[], bool]) -> None:
    """Give other threads turns until something holds; the test fails when it never does."""
    turn = threading.Event()
    for _ in range(WAIT_SECONDS * 1000):
        if holds():
            return
        turn.wait(0.001)
    raise AssertionError("it never came to hold")
