"""Claiming: exactly once, in fair order, cheap whatever else is in the table."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.stores import KINDS, Queue, new_id

pytestmark = pytest.mark.anyio


async def test_a_claim_returns_at_most_what_was_asked_and_marks_the_rows(queue: Queue) -> None:
    await queue.insert(5)
    tasks = await queue.claim(new_id(), most=3)
    assert len(tasks) == 3
    row = await queue.row(tasks[0].id)
    assert (row["status"], row["attempts"], str(row["claim_token"])) == ("processing", 1, tasks[0].token)


async def test_asking_again_with_one_token_gives_the_same_rows_and_no_more(queue: Queue) -> None:
    await queue.insert(10)
    worker, token = new_id(), new_id()
    first = await queue.claim(worker, most=4, token=token)
    again = await queue.claim(worker, most=4, token=token)
    assert {task.id for task in first} == {task.id for task in again}
    assert (await queue.statuses()) == {"processing": 4, "pending": 6}


async def test_overlapping_claims_with_one_token_take_one_set_of_rows(queue: Queue) -> None:
    await queue.insert(50)
    worker, token = new_id(), new_id()
    answers = await asyncio.gather(*(queue.claim(worker, most=10, token=token) for _ in range(5)))
    assert len({task.id for tasks in answers for task in tasks}) == 10


async def test_many_workers_never_get_the_same_row(queue: Queue) -> None:
    await queue.insert(300)
    answers = await asyncio.gather(*(queue.claim(new_id(), most=20) for _ in range(15)))
    ids = [task.id for tasks in answers for task in tasks]
    assert len(ids) == len(set(ids))


async def test_rows_of_kinds_that_were_not_asked_for_stay(queue: Queue) -> None:
    await queue.insert(2, kind="segment_everything")
    assert await queue.claim(new_id(), kinds=["segment_visual"]) == ()


async def test_rows_of_a_paused_kind_stay(queue: Queue) -> None:
    await queue.insert(2)
    await queue.sql.execute("update maskd.kinds set paused = true where kind = 'segment_visual'")
    assert await queue.claim(new_id()) == ()


async def test_a_higher_priority_goes_first(queue: Queue) -> None:
    await queue.insert(5)
    rich = await queue.new_owner(tier="pro")
    (paid,) = await queue.insert(1, rich)
    assert (await queue.claim(new_id(), most=1))[0].id == paid


async def test_one_users_backlog_does_not_hold_up_another_user(queue: Queue) -> None:
    await queue.insert(2000)
    other = await queue.new_owner()
    (late,) = await queue.insert(1, other)
    claimed = [task.id for _ in range(2) for task in await queue.claim(new_id(), most=2)]
    assert late in claimed


async def test_after_an_outage_a_new_user_is_not_behind_the_backlog(queue: Queue) -> None:
    await queue.insert(500)
    await queue.sql.execute(
        "update public.segmentation_results set fair_rank = fair_rank - 7200, created_at = created_at - interval '2 h'"
    )
    (late,) = await queue.insert(1, await queue.new_owner())
    claimed = [task.id for _ in range(2) for task in await queue.claim(new_id(), most=2)]
    assert late in claimed


async def test_rows_of_the_same_image_come_along_up_to_half_of_a_claim(queue: Queue) -> None:
    others = [await queue.new_owner() for _ in range(6)]
    mine = await queue.insert(10, image="same.jpg")
    for owner in others:
        await queue.insert(1, owner)
    tasks = await queue.claim(new_id(), most=14)
    same = [task for task in tasks if task.id in mine]
    assert len(tasks) == 14
    assert len(same) == 8, "one of mine leads by rank, and half of the claim follows its image"


async def test_a_claim_locks_no_row_that_it_does_not_take(queue: Queue) -> None:
    await queue.insert(20, kind="segment_visual")
    await queue.insert(20, kind="segment_everything")
    other = await queue.sql.fetchval("select $1::uuid", new_id())
    async with queue.sql.transaction():
        taken = await queue.sql.fetch("select * from maskd.claim($1, $2, $3, 10)", other, new_id(), list(KINDS))
        rest = await queue.claim(new_id(), most=100)
        assert len([row for row in taken if row["id"] is not None]) == 10
        assert len(rest) == 30


async def test_delayed_rows_become_claimable_when_due_and_the_next_due_time_is_told(queue: Queue) -> None:
    (due, later) = await queue.insert(2)
    await queue.sql.execute("update public.segmentation_results set status = 'delayed', run_after = now() where id = $1", due)
    await queue.sql.execute(
        "update public.segmentation_results set status = 'delayed', run_after = now() + interval '1 h' where id = $1", later
    )
    answer = await queue.answer(new_id())
    assert [task.id for task in answer.tasks] == [due]
    assert answer.next_due_seconds == pytest.approx(3600, abs=60)


async def test_a_claim_reads_the_table_by_its_indexes_however_many_rows_wait(queue: Queue) -> None:
    await queue.insert(3000, kind="segment_everything")
    await queue.insert(3000)
    await queue.sql.execute("analyze public.segmentation_results")
    reads = """select coalesce(seq_scan, 0) as scans, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) as rows
                 from pg_stat_xact_user_tables where relname = 'segmentation_results'"""
    async with queue.sql.transaction():
        before = await queue.sql.fetchrow(reads)
        await queue.sql.fetch("select * from maskd.claim($1, $2, $3, 10)", new_id(), new_id(), ["segment_visual"])
        after = await queue.sql.fetchrow(reads)
    assert after["scans"] == before["scans"], "no sequential scan"
    assert after["rows"] - before["rows"] < 150, "a claim of 10 reads some dozens of rows"


async def test_a_row_is_served_before_those_that_came_much_later_whatever_its_id(queue: Queue) -> None:
    for _ in range(6):
        await queue.insert(1, await queue.new_owner())
    await queue.sql.execute(
        """update public.segmentation_results set id = 'ffffffff-ffff-4fff-bfff-ffffffffffff'
            where id = (select id from public.segmentation_results order by fair_rank desc, id desc limit 1)"""
    )
    served: list[str] = []
    for _ in range(25):
        served += [task.id for task in await queue.claim(new_id(), most=1)]
        await queue.insert(1, await queue.new_owner())
    assert "ffffffff-ffff-4fff-bfff-ffffffffffff" in served


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(sizes=st.lists(st.integers(1, 30), min_size=2, max_size=5), most=st.integers(1, 12))
async def test_every_user_is_served_within_as_many_turns_as_there_are_users(queue: Queue, sizes: list[int], most: int) -> None:
    await queue.sql.execute("truncate public.segmentation_results")
    owners = [await queue.new_owner() for _ in sizes]
    for owner, size in zip(owners, sizes, strict=True):
        await queue.insert(size, owner, image=f"{size}.jpg")
    served: list[str | None] = []
    while len({*served}) < len(owners):
        tasks = await queue.claim(new_id(), most=most)
        assert tasks, "nobody is left out"
        served += [task.user_id for task in tasks]
    assert len(served) <= most + 2 * len(owners) * 2, "nobody waits for the whole of another's backlog"
