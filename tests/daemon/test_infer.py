"""Pools: one bad job never fails its neighbours, a hung thread is counted, GPU work leaves the device thread alone."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import anyio
import pytest
from prometheus_client import REGISTRY
from support.works import a_task, handler

from daemon.infer import DeviceDiedError, Pool, PoolDiedError, TimedOutError
from daemon.journal import Journal
from daemon.lanes import Threads
from daemon.steps import Answer
from daemon.work import Work
from handlers.base import Handler, Inputs, Job, Result
from models.base import DeviceLostError, Models, Role
from models.cache import EmbeddingCache

pytestmark = pytest.mark.anyio
MODELS = Models(EmbeddingCache(0))


def kind(
    run: Callable[..., Sequence[Any]],
    prepare: Callable[[Job], Any] = lambda job: job.params,
    batch: int = 8,
    finish: Callable[[Job, Any], Result] = lambda job, raw: Result(metadata={"raw": raw}),
) -> Handler:
    return handler(
        ROLES=frozenset(),
        BATCH_MAX=batch,
        TIMEOUT_FACTOR=1.0,
        parse=lambda request, limits: None,
        inputs=lambda params: Inputs(source=False),
        prepare=lambda job, models: prepare(job),
        run=run,
        finish=finish,
    )


class Bench:
    """A pool of one kind, and what it answered."""

    def __init__(
        self,
        made: Handler,
        aside: Threads | None = None,
        timeout_seconds: float = 30.0,
        threads: int = 1,
        models: Models = MODELS,
        kinds: Mapping[str, Handler] | None = None,
    ) -> None:
        self.made, kinds = made, kinds or {"k": made}
        self.answers: dict[Any, Answer] = {}
        self.dead = anyio.Event()
        self.died_of: PoolDiedError | None = None
        self._count = anyio.Event()
        self._wanted = 0
        self.pool = Pool(
            "test",
            models,
            kinds,
            threads=threads,
            prefetch_batches=1,
            sizes={kind: handler.BATCH_MAX for kind, handler in kinds.items()},
            timeout_seconds=timeout_seconds,
            journal=Journal(None, "w", "db"),
            aside=aside,
        )
        self.pool.on_answers = self._take
        self.pool.on_dead = self._died

    def _died(self, error: PoolDiedError) -> None:
        self.died_of = error
        self.dead.set()

    def _take(self, works: Sequence[Work], answers: Sequence[Answer]) -> None:
        for work, answer in zip(works, answers, strict=True):
            self.answers[work.params] = answer
        if len(self.answers) >= self._wanted:
            self._count.set()

    async def give(self, *params: Any) -> dict[Any, Answer]:
        self.answers.clear()
        self._count = anyio.Event()
        works = [Work(a_task("k"), self.made, "test", params=each, job=Job("t", each)) for each in params]
        self._wanted = len(params)
        self.pool.put(works)
        with anyio.fail_after(20):
            await self._count.wait()
        return self.answers


async def test_a_batch_is_answered_in_order() -> None:
    answers = await Bench(kind(lambda items, models, stop: [item * 2 for item in items])).give(1, 2, 3)
    assert {key: answer.metadata["raw"] for key, answer in answers.items() if isinstance(answer, Result)} == {1: 2, 2: 4, 3: 6}


async def test_a_job_that_cannot_be_prepared_leaves_its_neighbours_alone() -> None:
    def prepare(job: Job) -> Any:
        return 1 // job.params

    answers = await Bench(kind(lambda items, models, stop: list(items), prepare)).give(1, 0, 2)
    assert isinstance(answers[0], ZeroDivisionError)
    assert isinstance(answers[1], Result)
    assert isinstance(answers[2], Result)


async def test_a_batch_that_fails_as_a_whole_is_tried_one_by_one() -> None:
    def run(items: Sequence[int], models: Models, stop: Any) -> list[int]:
        if 13 in items:
            raise ValueError("unlucky")
        return list(items)

    answers = await Bench(kind(run)).give(1, 13, 2)
    assert isinstance(answers[13], ValueError)
    assert [isinstance(answers[key], Result) for key in (1, 2)] == [True, True]


async def test_a_handler_that_answers_too_little_fails_its_jobs_and_nothing_else() -> None:
    bench = Bench(kind(lambda items, models, stop: []))
    assert {type(answer) for answer in (await bench.give(1, 2)).values()} == {RuntimeError}
    assert bench.pool.room(["k"], {}) > 0


async def test_a_job_past_its_limit_times_out_and_its_thread_is_lost_until_it_returns() -> None:
    let_go = threading.Event()

    def run(items: Sequence[int], models: Models, stop: Any) -> list[int]:
        let_go.wait(30)
        return list(items)

    bench = Bench(kind(run), timeout_seconds=0.1)
    answers = await bench.give(1)
    assert isinstance(answers[1], TimedOutError)
    assert (bench.pool.lost, bench.pool.room(["k"], {})) == (1, 0)
    with anyio.fail_after(10):
        await bench.dead.wait()
    let_go.set()
    with anyio.fail_after(10):
        while bench.pool.lost:
            await anyio.lowlevel.checkpoint()
    assert isinstance(bench.answers[1], TimedOutError), "what comes too late is not wanted"


async def test_a_device_whose_thread_hangs_ends_the_pool_though_the_threads_beside_it_live() -> None:
    let_go = threading.Event()

    def run(items: Sequence[int], models: Models, stop: Any) -> list[int]:
        let_go.wait(30)
        return list(items)

    bench = Bench(kind(run), aside=Threads("aside", 2), timeout_seconds=0.1)
    answers = await bench.give(1)
    assert isinstance(answers[1], TimedOutError)
    with anyio.fail_after(10):
        await bench.dead.wait()
    assert type(bench.died_of) is PoolDiedError, "75: the device may be sound"
    let_go.set()


async def test_work_that_nobody_wants_stops_at_the_next_step() -> None:
    started = threading.Event()

    def run(items: Sequence[int], models: Models, stop: Callable[[], None]) -> list[int]:
        started.set()
        while True:
            stop()

    bench = Bench(kind(run))
    work = Work(a_task("k"), bench.made, "test", params=1, job=Job("t", 1))
    bench._wanted = 1
    bench.pool.put([work])
    await anyio.to_thread.run_sync(started.wait, 10)
    work.stopped = True
    with anyio.fail_after(10):
        await bench._count.wait()
    assert type(bench.answers[1]).__name__ == "StoppedError"


async def test_a_gpu_pool_prepares_and_finishes_beside_the_device_thread() -> None:
    names: dict[str, str] = {}

    def note(step: str) -> None:
        names[step] = threading.current_thread().name

    made = handler(
        ROLES=frozenset(),
        BATCH_MAX=4,
        TIMEOUT_FACTOR=1.0,
        prepare=lambda job, models: note("prepare"),
        run=lambda items, models, stop: [note("run") for _ in items],
        finish=lambda job, raw: note("finish") or Result(),
    )
    await Bench(made, aside=Threads("aside", 2)).give(1)
    assert names["run"].startswith("maskd-test")
    assert names["prepare"].startswith("aside")
    assert names["finish"].startswith("aside")


async def test_a_batch_that_is_too_large_for_the_memory_is_halved_until_it_fits() -> None:
    tried: list[int] = []

    def run(items: Sequence[int], models: Models, stop: Any) -> list[int]:
        tried.append(len(items))
        if len(items) > 2:
            raise MemoryError
        return list(items)

    counted = partial(REGISTRY.get_sample_value, "maskd_out_of_memory_total", {"pool": "test"})
    before = counted() or 0
    answers = await Bench(kind(run)).give(*range(8))
    assert all(isinstance(answer, Result) for answer in answers.values())
    assert tried == [8, 4, 2, 2, 4, 2, 2]
    assert counted() == before + 1, "one batch, however often it was halved"


async def test_a_lost_device_ends_the_pool_and_nothing_is_tried_again_on_it() -> None:
    calls: list[int] = []

    def run(items: Sequence[int], models: Models, stop: Any) -> list[int]:
        calls.append(len(items))
        raise DeviceLostError("CUDA error: an illegal memory access was encountered")

    bench = Bench(kind(run))
    answers = await bench.give(1, 2, 3)
    assert {type(answer) for answer in answers.values()} == {DeviceLostError}
    with anyio.fail_after(10):
        await bench.dead.wait()
    assert calls == [3]
    assert isinstance(bench.died_of, DeviceDiedError)


async def test_before_a_batch_its_roles_get_room() -> None:
    asked: list[frozenset[Role]] = []
    models = Models(EmbeddingCache(0), make_room=lambda roles, held: asked.append(roles))
    bench = Bench(kind(lambda items, models, stop: list(items)), models=models)
    await bench.give(1)
    assert asked == [frozenset()]


def test_room_is_counted_in_batches_of_each_kind() -> None:
    async def measure() -> None:
        single, many = kind(lambda *_: [], batch=1), kind(lambda *_: [], batch=8)
        pool = Bench(many, kinds={"one": single, "many": many}).pool
        assert pool.groups == (("one",), ("many",))
        assert (pool.room(["one"], {}), pool.room(["many"], {})) == (2, 16)
        assert (pool.room(["one"], {"many": 8}), pool.room(["many"], {"one": 1})) == (1, 8)
        assert (pool.room(["one"], {"many": 9}), pool.room(["many"], {"one": 2})) == (0, 0)

    anyio.run(measure)


async def test_a_batch_size_that_did_not_fit_is_remembered() -> None:
    tried: list[int] = []

    def run(items: Sequence[int], models: Models, stop: Any) -> list[int]:
        tried.append(len(items))
        if len(items) > 4:
            raise MemoryError
        return list(items)

    bench = Bench(kind(run))
    await bench.give(*range(8))
    await bench.give(*range(100, 108))
    assert tried == [8, 4, 4, 4, 4]


async def test_what_waits_for_a_busy_device_is_not_out_of_time() -> None:
    let_go = threading.Event()

    def run(items: Sequence[int], models: Models, stop: Any) -> list[int]:
        if 0 in items:
            let_go.wait(30)
        return list(items)

    bench = Bench(kind(run), aside=Threads("aside", 1))
    works = [Work(a_task("k"), bench.made, "test", params=each, job=Job("t", each)) for each in range(9)]
    bench._wanted = 9
    bench.pool.put(works[:8])
    bench.pool.put(works[8:])
    device = bench.pool._threads
    with anyio.fail_after(20):
        while sorted(running.taken for running in bench.pool._running if running.on is device) != [False, True]:
            await anyio.lowlevel.checkpoint()
    (waits,) = [running for running in bench.pool._running if running.on is device and not running.taken]
    assert waits.timer is not None
    assert waits.timer.cancelled()
    let_go.set()
    with anyio.fail_after(20):
        await bench._count.wait()
    assert {type(answer) for answer in bench.answers.values()} == {Result}
    assert not bench.dead.is_set()


async def test_finishing_has_a_time_limit_and_a_culprit() -> None:
    let_go = threading.Event()

    def finish(job: Job, raw: Any) -> Result:
        let_go.wait(30)
        return Result()

    bench = Bench(kind(lambda items, models, stop: list(items), finish=finish), aside=Threads("aside", 2), timeout_seconds=0.1)
    ended: list[int] = []
    bench.pool._journal.end = ended.append  # type: ignore[method-assign]
    answers = await bench.give(1)
    assert isinstance(answers[1], TimedOutError)
    assert ended == [], "the journal names it for as long as it runs"
    let_go.set()
    with anyio.fail_after(10):
        while not ended:
            await anyio.lowlevel.checkpoint()
    assert not bench.dead.is_set(), "a thread beside the device is no device"


async def test_what_was_not_on_a_lost_device_is_nobodys_fault() -> None:
    begun = threading.Event()
    let_go = threading.Event()

    def run(items: Sequence[int], models: Models, stop: Any) -> list[int]:
        begun.set()
        let_go.wait(30)
        raise DeviceLostError("CUDA error")

    bench = Bench(kind(run, batch=1), aside=Threads("aside", 1))
    works = [Work(a_task("k"), bench.made, "test", params=each, job=Job("t", each)) for each in range(4)]
    bench._wanted = 1
    bench.pool.put(works)
    await anyio.to_thread.run_sync(begun.wait, 10)
    let_go.set()
    with anyio.fail_after(10):
        await bench.dead.wait()
        await bench._count.wait()
    assert list(bench.answers) == [0]
    assert [work.begun for work in works] == [True, False, False, False]
    assert bench.pool.room(["k"], {}) == 0


async def test_a_panic_in_native_code_leaves_the_thread_alive() -> None:
    class Panic(BaseException):
        pass

    def run(items: Sequence[int], models: Models, stop: Any) -> list[int]:
        if items == [1]:
            raise Panic("index out of bounds")
        return list(items)

    bench = Bench(kind(run))
    answers = await bench.give(1)
    assert isinstance(answers[1], RuntimeError)
    assert "Panic" in str(answers[1])
    assert isinstance((await bench.give(2))[2], Result)
