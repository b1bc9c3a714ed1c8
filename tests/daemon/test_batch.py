"""Batches: one kind, oldest first, shared among free threads, small after running out of memory."""

from __future__ import annotations

from support.works import a_work

from daemon.batch import RECOVER_AFTER_BATCHES, Batcher


def test_a_batch_holds_one_kind_in_order_of_arrival() -> None:
    batcher = Batcher({"a": 4, "b": 4})
    works = [a_work(kind) for kind in "aabba"]
    batcher.add(works)
    assert batcher.take(1) == [works[0], works[1], works[4]]
    assert batcher.take(1) == [works[2], works[3]]
    assert batcher.take(1) == []


def test_a_batch_leaves_work_for_the_other_free_threads() -> None:
    batcher = Batcher({"a": 4})
    for _ in range(4):
        batcher.add([a_work("a")])
    assert [len(batcher.take(free)) for free in (4, 3, 2, 1)] == [1, 1, 1, 1]


def test_kinds_take_turns_so_that_a_flood_of_one_does_not_hold_up_the_other() -> None:
    batcher = Batcher({"a": 2, "b": 2})
    for _ in range(10):
        batcher.add([a_work("a")])
    batcher.add([a_work("b")])
    assert [batch[0].task.kind for batch in (batcher.take(1), batcher.take(1))] == ["a", "b"]


def test_works_that_nobody_wants_any_more_are_left_out() -> None:
    batcher = Batcher({"a": 4})
    gone = a_work("a")
    gone.stopped = True
    batcher.add([gone])
    assert batcher.take(1) == []


def test_after_running_out_of_memory_batches_are_half_as_large_for_a_while() -> None:
    batcher = Batcher({"a": 8})
    batcher.halve("a", 8)
    sizes = []
    while len(sizes) <= RECOVER_AFTER_BATCHES:
        for _ in range(16):
            batcher.add([a_work("a")])
        sizes.append(len(batcher.take(1)))
    assert sizes == [4] * RECOVER_AFTER_BATCHES + [8]
