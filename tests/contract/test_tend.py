"""The one call of a worker that holds nothing: it beats, rescues, sweeps and looks, and nobody is late for the dead by it."""

from __future__ import annotations

import pytest
from support.stores import KINDS, Queue, new_id

from daemon.lease import rest_seconds
from storage.base import Tended

pytestmark = pytest.mark.anyio


async def tend(queue: Queue, worker: str, ahead: float = 20.0) -> Tended:
    found = await queue.store.tend(worker, 30.0, 600.0, 10, ahead)
    assert found is not None
    return found


async def test_a_worker_that_is_not_known_has_to_say_who_it_is(queue: Queue) -> None:
    worker = new_id()
    assert await queue.store.tend(worker, 30.0, 600.0, 10, 20.0) is None
    await queue.beat(worker)
    assert await tend(queue, worker) == Tended(0)


async def test_it_is_a_beat_that_keeps_what_was_said_of_the_worker(queue: Queue) -> None:
    worker = new_id()
    await queue.steady(worker)
    await queue.silence(worker, 20)
    await tend(queue, worker)
    (row,) = await queue.sql.fetch("select *, clock_timestamp() - beat_at < '10 s' as fresh from maskd.workers")
    assert row["fresh"]
    assert row["kinds"] == list(KINDS)
    assert (row["beat_at"] - row["steady_since"]).total_seconds() > 3000, "a gap within the lease is none"


async def test_a_gap_longer_than_the_lease_is_one(queue: Queue) -> None:
    worker, dead = new_id(), new_id()
    await queue.insert()
    await queue.steady(worker)
    await queue.claim(dead)
    await queue.silence(worker, 31)
    assert (await tend(queue, worker)).rescued == 0, "who was away calls nobody dead"


async def test_it_takes_back_the_rows_of_the_dead_and_then_finds_them(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    dead, living = new_id(), new_id()
    await queue.beat(dead)
    await queue.claim(dead)
    await queue.silence(dead)
    await queue.steady(living)
    found = await tend(queue, living)
    assert (found.rescued, found.work) == (1, True)
    assert (await queue.row(task_id))["status"] == "pending"


async def test_it_says_when_the_next_worker_that_holds_rows_would_be_silent(queue: Queue) -> None:
    await queue.insert()
    idle, busy, living = new_id(), new_id(), new_id()
    await queue.beat(idle)
    await queue.silence(idle, 29)
    await queue.steady(living)
    assert (await tend(queue, living)).silent_seconds is None, "who holds nothing need not be watched"
    await queue.beat(busy, await queue.claim(busy))
    await queue.silence(busy, 25)
    silent = (await tend(queue, living)).silent_seconds
    assert silent is not None
    assert 0 < silent <= 5


@pytest.mark.parametrize(("silent", "seconds"), [(None, 20.0), (29.0, 20.0), (5.0, 5.5), (-3.0, 1.0)])
def test_a_look_comes_when_a_lease_is_over_and_never_later_than_two_thirds_of_ones_own(
    silent: float | None, seconds: float
) -> None:
    assert rest_seconds(30.0, silent) == seconds


async def test_it_sees_work_that_a_claim_would_find_and_no_other(queue: Queue) -> None:
    worker = new_id()
    await queue.beat(worker)
    assert not (await tend(queue, worker)).work
    await queue.sql.execute("insert into maskd.kinds (kind) values ('of_others') on conflict do nothing")
    await queue.insert(kind="of_others")
    await queue.insert()
    assert (await tend(queue, worker)).work
    await queue.sql.execute("update maskd.kinds set paused = true where kind <> 'of_others'")
    assert not (await tend(queue, worker)).work


async def test_it_sees_suspects_and_what_is_due_before_the_next_look(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    worker = new_id()
    await queue.beat(worker)
    await queue.sql.execute("update public.segmentation_results set deaths = 1")
    assert (await tend(queue, worker)).work
    await queue.sql.execute(
        """update public.segmentation_results set deaths = 0, status = 'delayed', run_after = clock_timestamp() + '15 s'
            where id = $1""",
        task_id,
    )
    assert (await tend(queue, worker, 20)).work
    assert not (await tend(queue, worker, 5)).work


async def test_it_brings_tombstones_once(queue: Queue) -> None:
    await queue.insert()
    worker, living = new_id(), new_id()
    (task,) = await queue.claim(worker)
    await queue.store.bury(worker, [])
    await queue.sql.execute("update maskd.tombstones set due_at = now()")
    await queue.beat(living)
    (stone,) = (await tend(queue, living)).tombstones
    assert stone.prefix == f"masks/{task.project_id}/{task.id}/{task.token}/"
    assert (await tend(queue, living)).tombstones == ()
    await queue.store.bury_tombstones([stone.id])


async def test_rows_whose_claim_was_never_heard_of_go_back(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    worker = new_id()
    await queue.beat(worker)
    await queue.claim(worker)
    await queue.sql.execute("update public.segmentation_results set started_at = started_at - interval '1 min'")
    assert (await tend(queue, worker)).work
    assert (await queue.row(task_id))["attempts"] == 0
