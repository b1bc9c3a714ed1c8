"""Leases: the silent lose their rows, the living never do, and only what kills is blamed."""

from __future__ import annotations

import pytest
from support.stores import KINDS, Queue, new_id

from storage.base import Beat, Fate

pytestmark = pytest.mark.anyio


async def dies(queue: Queue, begun: list[str] | None = None) -> None:
    """A worker claims everything, begins `begun` (all when None), and falls silent; another one rescues."""
    dead, living = new_id(), new_id()
    await queue.beat(dead)
    tasks = await queue.claim(dead)
    await queue.beat(dead, tasks, [task.id for task in tasks] if begun is None else begun)
    await queue.silence(dead)
    await queue.steady(living)
    await queue.store.rescue(living, 600)
    await queue.store.leave(living)


async def test_rows_of_a_silent_worker_go_back_once(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    dead, living = new_id(), new_id()
    await queue.beat(dead)
    await queue.claim(dead)
    await queue.silence(dead)
    await queue.steady(living)
    assert await queue.store.rescue(living, 600) == 1
    assert await queue.store.rescue(living, 600) == 0
    assert (await queue.row(task_id))["status"] == "pending"


async def test_rows_of_a_worker_nobody_knows_go_back(queue: Queue) -> None:
    await queue.insert()
    await queue.claim(new_id())
    living = new_id()
    await queue.steady(living)
    assert await queue.store.rescue(living, 600) == 1


async def test_rows_of_a_living_worker_stay(queue: Queue) -> None:
    await queue.insert()
    owner, living = new_id(), new_id()
    await queue.beat(owner)
    await queue.claim(owner)
    await queue.steady(living)
    assert await queue.store.rescue(living, 600) == 0


async def test_a_worker_that_has_just_come_back_calls_nobody_dead(queue: Queue) -> None:
    """After an outage of the database everybody looks silent."""
    await queue.insert()
    one, two = new_id(), new_id()
    for worker in (one, two):
        await queue.steady(worker)
    tasks = await queue.claim(one)
    for worker in (one, two):
        await queue.silence(worker, 300)
    await queue.beat(two)
    assert await queue.store.rescue(two, 600) == 0
    assert await queue.beat(one, tasks) == []


async def test_a_claim_whose_reply_was_lost_goes_back_by_the_next_beats(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    worker = new_id()
    await queue.claim(worker)
    await queue.beat(worker)
    assert (await queue.row(task_id))["status"] == "processing", "it may still be on its way"
    await queue.sql.execute("update public.segmentation_results set started_at = started_at - interval '1 min'")
    await queue.beat(worker)
    row = await queue.row(task_id)
    assert (row["status"], row["attempts"]) == ("pending", 0)


async def test_a_claim_that_is_still_being_asked_for_is_left_alone(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    worker, token = new_id(), new_id()
    await queue.claim(worker, token=token)
    await queue.sql.execute("update public.segmentation_results set started_at = started_at - interval '1 min'")
    await queue.beat(worker, open_tokens=[token])
    assert (await queue.row(task_id))["status"] == "processing"


async def test_a_beat_brings_news_of_claims_that_are_gone(queue: Queue) -> None:
    await queue.insert(2)
    worker = new_id()
    tasks = await queue.claim(worker)
    await queue.sql.execute("select maskd.cancel(array[$1::text::uuid])", tasks[0].id)
    assert await queue.beat(worker, tasks) == [(tasks[0].id, tasks[0].token)]


async def test_a_worker_that_leaves_gives_its_rows_back_with_their_attempt(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    worker = new_id()
    await queue.beat(worker)
    await queue.claim(worker)
    await queue.store.leave(worker)
    row = await queue.row(task_id)
    assert (row["status"], row["attempts"]) == ("pending", 0)
    assert (await queue.store.status())["workers"] == []


async def test_a_begun_row_counts_a_death_and_gets_its_attempt_back(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    await dies(queue)
    row = await queue.row(task_id)
    assert (row["status"], row["deaths"], row["attempts"]) == ("pending", 1, 0)


async def test_a_row_that_was_not_begun_counts_no_death(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    await dies(queue, begun=[])
    row = await queue.row(task_id)
    assert (row["status"], row["deaths"], row["attempts"]) == ("pending", 0, 1)


async def test_a_row_whose_workers_vanish_unseen_becomes_a_suspect_and_is_never_given_up(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    for _ in range(3):
        await dies(queue, begun=[])
        await queue.sql.execute("update public.segmentation_results set run_after = now() where status = 'delayed'")
    row = await queue.row(task_id)
    assert (row["status"], row["deaths"], row["attempts"]) == ("pending", 1, 0)


async def test_suspects_are_not_claimed_with_clean_rows_but_announced(queue: Queue) -> None:
    await queue.insert(3)
    await dies(queue)
    answer = await queue.answer(new_id())
    assert (answer.tasks, answer.suspects) == ((), True)


async def test_suspects_with_one_death_run_in_a_cohort_those_with_two_alone(queue: Queue) -> None:
    await queue.insert(5)
    await dies(queue)
    worker = new_id()
    cohort = (await queue.store.claim_suspects(worker, new_id(), ["segment_visual"], 100)).tasks
    assert len(cohort) == 5
    await queue.store.bury(worker, [task.id for task in cohort])
    alone = (await queue.store.claim_suspects(worker, new_id(), ["segment_visual"], 100)).tasks
    assert [task.deaths for task in alone] == [2]


async def test_at_most_one_worker_isolates_a_kind(queue: Queue) -> None:
    await queue.insert(40)
    await dies(queue)
    first = await queue.store.claim_suspects(new_id(), new_id(), ["segment_visual"], 4)
    second = await queue.store.claim_suspects(new_id(), new_id(), ["segment_visual"], 4)
    assert (len(first.tasks), len(second.tasks)) == (4, 0)
    assert not (await queue.answer(new_id())).suspects


async def test_only_a_row_that_kills_alone_ends_as_poison(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    await dies(queue)
    worker = new_id()
    for expected in ("pending", "pending", "error"):
        tasks = (await queue.store.claim_suspects(worker, new_id(), ["segment_visual"], 100)).tasks
        assert [task.id for task in tasks] == [task_id]
        await queue.store.bury(worker, [task_id])
        assert (await queue.row(task_id))["status"] == expected
    assert (await queue.error(task_id) or {})["code"] == "poison"


async def test_a_superseded_attempts_blobs_get_a_tombstone_that_never_names_the_published_ones(queue: Queue) -> None:
    await queue.insert()
    worker = new_id()
    await queue.beat(worker)
    (old,) = await queue.claim(worker)
    await queue.store.bury(worker, [])
    (new,) = await queue.claim(new_id())
    await queue.settle([new])
    await queue.sql.execute("update maskd.tombstones set due_at = now()")
    assert [stone.prefix for stone in await queue.store.tombstones(10)] == [f"masks/{old.project_id}/{old.id}/{old.token}/"]


async def test_a_row_that_no_worker_could_serve_for_long_ends_as_engine_unavailable(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    living = new_id()
    await queue.steady(living)
    await queue.sql.execute("update maskd.kinds set served_at = now() - interval '20 min'")
    await queue.sql.execute("update public.segmentation_results set pending_at = now() - interval '20 min'")
    await queue.sql.execute("update maskd.workers set kinds = '{}'")
    await queue.store.rescue(living, 600)
    assert (await queue.error(task_id) or {})["code"] == "engine_unavailable"


async def test_a_row_of_a_served_kind_waits_as_long_as_it_takes(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    living = new_id()
    await queue.steady(living)
    await queue.sql.execute("update public.segmentation_results set pending_at = now() - interval '20 min'")
    await queue.store.rescue(living, 600)
    assert (await queue.row(task_id))["status"] == "pending"
    await queue.settle(await queue.claim(living), Fate.DONE)


async def test_a_row_without_a_project_is_refused_and_stops_nobody(queue: Queue) -> None:
    await queue.sql.execute("insert into public.segmentation_results (kind) values ('segment_visual')")
    assert await queue.statuses() == {"error": 1}


async def test_rows_that_an_adopted_table_had_in_processing_are_left_alone(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    await queue.sql.execute("update public.segmentation_results set status = 'processing'")
    living = new_id()
    await queue.steady(living)
    assert await queue.store.rescue(living, 600) == 0
    assert (await queue.row(task_id))["status"] == "processing"


async def test_an_operators_open_transaction_on_a_kind_does_not_hold_up_beats(queue: Queue) -> None:
    async with queue.sql.transaction():
        await queue.sql.execute("update maskd.kinds set paused = true where kind = 'segment_visual'")
        assert await queue.beat(new_id()) == []


async def test_a_kind_whose_living_worker_beats_seldom_is_served(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    busy, other = new_id(), new_id()
    await queue.store.beat(Beat(busy, 3600.0, {}, KINDS, [], [], []))
    await queue.steady(other)
    await queue.sql.execute(
        """update maskd.workers set kinds = '{}', steady_since = steady_since - interval '1 hour' where id = $1""", other
    )
    await queue.silence(busy, 1200)
    await queue.sql.execute("update maskd.kinds set served_at = clock_timestamp() - interval '1200 s'")
    await queue.sql.execute("update public.segmentation_results set pending_at = pending_at - interval '700 s'")
    await queue.store.rescue(other, 600)
    assert (await queue.row(task_id))["status"] == "pending"
