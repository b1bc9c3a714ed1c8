"""What a worker at rest tells the database of its life, whatever holds up the rest."""

from __future__ import annotations

from typing import cast

import anyio
import pytest
from support.database import Database
from support.stores import KINDS, Queue, new_id

from daemon.lease import Lease
from daemon.work import Held
from storage.base import Beat, TaskStore, UnavailableError

pytestmark = pytest.mark.anyio


async def test_a_row_that_somebody_holds_does_not_hold_up_the_one_call_of_a_resting_worker(database: Database) -> None:
    queue = await Queue.open(database)
    (parent,) = await queue.insert()
    child = await queue.sql.fetchval(
        """insert into public.segmentation_results (project_id, kind, source_image_url, after)
           select project_id, kind, source_image_url, id from public.segmentation_results returning id"""
    )
    await queue.sql.execute("update public.segmentation_results set status = 'done' where id = $1", parent)
    worker = new_id()
    await queue.steady(worker)
    async with queue.sql.transaction():
        await queue.sql.execute("select from public.segmentation_results where id = $1 for update", child)
        assert await queue.store.tend(worker, 30.0, 600.0, 10, 20.0) is not None
    assert await queue.store.tend(worker, 30.0, 600.0, 10, 20.0) is not None
    assert (await queue.row(str(child)))["status"] == "pending"
    await queue.close()


async def test_a_worker_whose_one_call_fails_beats_instead() -> None:
    class Stuck:
        """A store whose `tend` waits for what others hold, and whose `beat` does not."""

        def __init__(self) -> None:
            self.beaten = anyio.Event()

        async def tend(self, *_: object) -> None:
            raise UnavailableError("the database answered 55P03: canceling statement due to lock timeout")

        async def beat(self, beat: Beat) -> list[tuple[str, str]]:
            self.beaten.set()
            return []

    store = Stuck()
    lease = Lease(cast(TaskStore, store), new_id(), Held(), 30.0, 600.0)
    reasons: list[str] = []
    lease.kinds, lease.may_rest, lease.failing = KINDS, lambda: True, reasons.append
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(lease.run)
        with anyio.fail_after(5):
            await store.beaten.wait()
        tasks.cancel_scope.cancel()
    assert len(reasons) == 1
