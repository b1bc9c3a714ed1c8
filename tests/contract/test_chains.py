"""A task may wait for another of its project; whatever ends the other one decides about it."""

from __future__ import annotations

import asyncio
import json

import pytest
from support.stores import Queue, new_id

from storage.base import Fate
from storage.client import Owner

pytestmark = pytest.mark.anyio


async def after(queue: Queue, parent: str, owner: Owner | None = None) -> str:
    owner = owner or queue.owner
    return await queue.sql.fetchval(
        """insert into public.segmentation_results (project_id, kind, source_image_url, after)
           values ($1, 'segment_visual', $2, $3) returning id::text""",
        owner.project_id,
        f"uploads/{owner.user_id}/a.jpg",
        parent,
    )


async def test_a_child_waits_and_is_promoted_when_its_parent_is_done(queue: Queue) -> None:
    (parent,) = await queue.insert()
    child = await after(queue, parent)
    assert (await queue.row(child))["status"] == "waiting"
    await queue.settle(await queue.claim(new_id()))
    assert (await queue.row(child))["status"] == "pending"


async def test_a_chain_fails_to_its_end_when_its_first_task_fails(queue: Queue) -> None:
    (parent,) = await queue.insert()
    child = await after(queue, parent)
    grandchild = await after(queue, child)
    await queue.settle(await queue.claim(new_id()), Fate.FAILED, code="image_invalid", message="x")
    assert [(await queue.error(task) or {})["code"] for task in (child, grandchild)] == ["after_failed"] * 2


async def test_a_child_of_a_finished_task_starts_at_once(queue: Queue) -> None:
    (parent,) = await queue.insert()
    await queue.settle(await queue.claim(new_id()))
    assert (await queue.row(await after(queue, parent)))["status"] == "pending"


async def test_a_foreign_missing_or_failed_parent_is_refused_with_a_code(queue: Queue) -> None:
    stranger = await queue.new_owner()
    (foreign,) = await queue.insert(1, stranger)
    (failed,) = await queue.insert()
    await queue.settle(
        [task for task in await queue.claim(new_id()) if task.id == failed], Fate.FAILED, code="internal", message="x"
    )
    for parent in (foreign, new_id(), failed):
        assert (await queue.error(await after(queue, parent)) or {})["code"] == "after_failed"


async def test_children_of_a_deleted_task_fail(queue: Queue) -> None:
    (parent,) = await queue.insert()
    child = await after(queue, parent)
    await queue.sql.execute("delete from public.segmentation_results where id = $1", parent)
    assert (await queue.error(child) or {})["code"] == "after_failed"


async def test_a_child_inserted_while_its_parent_settles_never_waits_for_ever(queue: Queue) -> None:
    for _ in range(20):
        (parent,) = await queue.insert()
        tasks = await queue.claim(new_id())
        child, _ = await asyncio.gather(after(queue, parent), queue.settle([task for task in tasks if task.id == parent]))
        assert (await queue.row(child))["status"] == "pending"
        await queue.sql.execute("delete from public.segmentation_results")


async def chained(queue: Queue, parent: str) -> str:
    """A task after `parent` that names no image."""
    return str(
        await queue.sql.fetchval(
            """insert into public.segmentation_results (project_id, kind, after) values ($1, 'convert_image', $2)
               returning id::text""",
            queue.owner.project_id,
            parent,
        )
    )


@pytest.mark.parametrize("made", ["masks/made.png", None])
async def test_a_child_without_an_image_takes_what_its_parent_made_or_looked_at(queue: Queue, made: str | None) -> None:
    (parent,) = await queue.insert()
    waiting = await chained(queue, parent)
    await queue.settle(await queue.claim(new_id()), values=json.dumps({"result_image_url": made} if made else {}))
    late = await chained(queue, parent)
    looked_at = await queue.sql.fetchval("select source_image_url from public.segmentation_results where id = $1", parent)
    for child in (waiting, late):
        row = await queue.sql.fetchrow("select status, source_image_url from public.segmentation_results where id = $1", child)
        assert (row["status"], row["source_image_url"]) == ("pending", made or looked_at)


async def test_a_child_that_is_retried_after_its_parent_takes_what_that_one_made(queue: Queue) -> None:
    (parent,) = await queue.insert()
    child = await chained(queue, parent)
    await queue.settle(await queue.claim(new_id()), Fate.FAILED, code="internal", message="x")
    assert (await queue.error(child) or {})["code"] == "after_failed"
    await queue.retry([parent], None, 1)
    await queue.settle(await queue.claim(new_id()), values=json.dumps({"result_image_url": "masks/made.png"}))
    assert await queue.retry([child], None, 1) == 1
    row = await queue.sql.fetchrow("select status, source_image_url from public.segmentation_results where id = $1", child)
    assert (row["status"], row["source_image_url"]) == ("pending", "masks/made.png")
