"""Settling: only under a claim that stands, once, however often it is said."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.stores import Queue, new_id

from storage.base import Fate, Outcome, RefusedError, UnavailableError, Verdict

pytestmark = pytest.mark.anyio


async def test_a_done_task_has_its_values_and_keeps_its_token(queue: Queue) -> None:
    await queue.insert()
    (task,) = await queue.claim(new_id())
    values = json.dumps({"mask_image_url": "m.png", "masks_url": "m.json", "labels": [{"id": 1}], "metadata": {"engine": "x"}})
    assert await queue.settle([task], values=values) == {}
    row = await queue.row(task.id)
    assert (row["status"], row["mask_image_url"], json.loads(row["labels"])) == ("done", "m.png", [{"id": 1}])
    assert row["finished_at"] is not None
    assert str(row["claim_token"]) == task.token


async def test_settling_again_under_the_same_token_changes_nothing_and_says_already(queue: Queue) -> None:
    await queue.insert()
    (task,) = await queue.claim(new_id())
    await queue.settle([task], values='{"mask_image_url": "first"}')
    assert await queue.settle([task], values='{"mask_image_url": "second"}') == {task.id: "already"}
    assert (await queue.row(task.id))["mask_image_url"] == "first"


async def test_concurrent_replays_of_one_outcome_are_never_told_lost(queue: Queue) -> None:
    await queue.insert(40)
    tasks = await queue.claim(new_id())
    answers = await asyncio.gather(*(queue.settle(tasks) for _ in range(5)))
    assert "lost" not in {verdict for answer in answers for verdict in answer.values()}


async def test_a_stale_performer_cannot_settle_after_its_claim_was_taken_back(queue: Queue) -> None:
    await queue.insert()
    dead, living = new_id(), new_id()
    await queue.beat(dead)
    (stale,) = await queue.claim(dead)
    await queue.silence(dead)
    await queue.steady(living)
    assert await queue.store.rescue(living, 600) == 1
    (fresh,) = await queue.claim(living)
    assert await queue.settle([stale], values='{"mask_image_url": "stale"}') == {stale.id: "lost"}
    assert await queue.settle([fresh], values='{"mask_image_url": "fresh"}') == {}
    assert (await queue.row(fresh.id))["mask_image_url"] == "fresh"


async def test_one_stale_outcome_does_not_hold_up_its_neighbours(queue: Queue) -> None:
    await queue.insert(3)
    tasks = await queue.claim(new_id())
    await queue.sql.execute("select maskd.cancel(array[$1::text::uuid])", tasks[1].id)
    assert await queue.settle(tasks) == {tasks[1].id: "lost"}
    assert await queue.statuses() == {"done": 2, "canceled": 1}


async def test_a_failed_task_ends_with_code_and_sentence(queue: Queue) -> None:
    await queue.insert()
    tasks = await queue.claim(new_id())
    await queue.settle(tasks, Fate.FAILED, code="image_invalid", message="Not an image.")
    assert await queue.error(tasks[0].id) == {"code": "image_invalid", "message": "Not an image."}
    assert await queue.statuses() == {"error": 1}


async def test_a_retry_waits_for_its_delay_and_ends_when_attempts_are_spent(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    for attempt in (1, 2, 3):
        tasks = await queue.claim(new_id())
        assert [task.attempts for task in tasks] == [attempt]
        await queue.settle(tasks, Fate.RETRY, code="internal", message="No luck.", delay_seconds=3600)
        assert await queue.claim(new_id()) == ()
        await queue.sql.execute("update public.segmentation_results set run_after = now() where status = 'delayed'")
    assert (await queue.row(task_id))["status"] == "error"
    assert (await queue.error(task_id) or {})["code"] == "internal"


async def test_a_released_task_gets_its_attempt_back(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    await queue.settle(await queue.claim(new_id()), Fate.RELEASED)
    row = await queue.row(task_id)
    assert (row["status"], row["attempts"]) == ("pending", 0)


async def test_values_that_postgres_does_not_take_are_refused_as_such(queue: Queue) -> None:
    await queue.insert()
    tasks = await queue.claim(new_id())
    with pytest.raises(RefusedError):
        await queue.settle(tasks, values='{"metadata": {"text": "\\u0000"}}')


async def test_blobs_that_an_unfinished_attempt_may_have_written_get_a_tombstone(queue: Queue) -> None:
    await queue.insert()
    (task,) = await queue.claim(new_id())
    await queue.store.settle([Outcome(task.id, task.token, Fate.RETRY, code="internal", message="x", wrote=True)])
    (tombstone,) = await queue.store.tombstones(10)
    assert tombstone.prefix == f"masks/{task.project_id}/{task.id}/{task.token}/"
    assert await queue.store.tombstones(10) == [], "nobody else takes it meanwhile"
    await queue.store.bury_tombstones([tombstone.id])
    assert await queue.sql.fetchval("select count(*) from maskd.tombstones") == 0


async def test_a_deleted_tasks_blobs_get_a_tombstone(queue: Queue) -> None:
    await queue.insert()
    (task,) = await queue.claim(new_id())
    await queue.settle([task])
    await queue.sql.execute("delete from public.segmentation_results where id = $1", task.id)
    await queue.sql.execute("update maskd.tombstones set due_at = now()")
    (tombstone,) = await queue.store.tombstones(10)
    assert tombstone.prefix == f"masks/{task.project_id}/{task.id}/{task.token}/"


async def test_retry_by_hand_starts_attempts_and_deaths_anew(queue: Queue) -> None:
    await queue.insert(2)
    tasks = await queue.claim(new_id())
    await queue.settle(tasks[:1], Fate.FAILED, code="internal", message="x")
    await queue.settle(tasks[1:], Fate.FAILED, code="image_invalid", message="x")
    assert await queue.retry(None, "internal", 100) == 1
    row = await queue.row(tasks[0].id)
    assert (row["status"], row["attempts"], row["error"], row["claim_token"]) == ("pending", 0, None, None)


async def test_a_task_whose_batch_hung_goes_back_as_a_suspect_with_its_attempt(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    await queue.settle(await queue.claim(new_id()), Fate.SUSPECT)
    row = await queue.row(task_id)
    assert (row["status"], row["attempts"], row["deaths"]) == ("pending", 0, 1)


async def test_a_stale_and_a_new_claim_of_one_task_in_one_batch_get_a_verdict_each(queue: Queue) -> None:
    await queue.insert()
    worker = new_id()
    (old,) = await queue.claim(worker)
    await queue.store.bury(worker, [])
    (new,) = await queue.claim(worker)
    ends = [Outcome(task.id, task.token, Fate.DONE) for task in (new, old)]
    assert await queue.store.settle(ends) == {(old.id, old.token): Verdict.LOST}
    assert await queue.store.settle(ends) == {(old.id, old.token): Verdict.LOST, (new.id, new.token): Verdict.ALREADY}


async def test_a_canceled_tasks_late_result_is_lost_so_that_its_blobs_go(queue: Queue) -> None:
    await queue.insert()
    tasks = await queue.claim(new_id())
    await queue.sql.execute("select maskd.cancel(array(select id from public.segmentation_results))")
    assert await queue.settle(tasks) == {tasks[0].id: "lost"}


async def test_a_task_deleted_and_inserted_again_under_its_id_keeps_its_new_blobs(queue: Queue) -> None:
    (task_id,) = await queue.insert()
    (old,) = await queue.claim(new_id())
    await queue.settle([old])
    await queue.sql.execute("delete from public.segmentation_results")
    await queue.sql.execute(
        "insert into public.segmentation_results (id, project_id, kind, source_image_url) values ($1, $2, 'segment_visual', $3)",
        task_id,
        queue.owner.project_id,
        f"uploads/{queue.owner.user_id}/a.jpg",
    )
    (new,) = await queue.claim(new_id())
    await queue.settle([new])
    await queue.sql.execute("update maskd.tombstones set due_at = now()")
    assert [stone.prefix for stone in await queue.store.tombstones(10)] == [f"masks/{old.project_id}/{task_id}/{old.token}/"]


async def test_a_child_whose_parent_failed_is_not_put_back_alone(queue: Queue) -> None:
    (parent,) = await queue.insert()
    await queue.sql.execute(
        """insert into public.segmentation_results (project_id, kind, source_image_url, after)
           values ($1, 'segment_visual', $2, $3)""",
        queue.owner.project_id,
        f"uploads/{queue.owner.user_id}/a.jpg",
        parent,
    )
    await queue.settle(await queue.claim(new_id()), Fate.FAILED, code="image_invalid", message="x")
    assert await queue.retry(None, "after_failed", 10) == 0


async def test_a_row_that_somebody_holds_ends_the_wait_on_the_server_too(queue: Queue) -> None:
    await queue.insert(2)
    tasks = await queue.claim(new_id())
    async with queue.sql.transaction():
        await queue.sql.execute("select from public.segmentation_results where id = $1 for update", tasks[0].id)
        with pytest.raises(UnavailableError):
            await queue.settle(tasks)
        waiting = "select count(*) from pg_stat_activity where wait_event_type = 'Lock' and datname = current_database()"
        assert await queue.sql.fetchval(waiting) == 0
    assert await queue.settle(tasks) == {}
    assert await queue.statuses() == {"done": 2}
