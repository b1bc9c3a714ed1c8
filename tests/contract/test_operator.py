"""What operators' commands ask of the queue, by either way to it: found, cancelled, put back, paused and pruned, in any
order."""

from __future__ import annotations

import json
from typing import Any

import anyio
import anyio.lowlevel
import pytest
from support.database import Database
from support.people import Person, create, person
from support.stores import KINDS, Queue, new_id

from storage.base import Fate

pytestmark = pytest.mark.anyio

READS = """select coalesce(seq_scan, 0) as scans, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) as rows
             from pg_stat_xact_user_tables where relname = 'segmentation_results'"""
OLD = "update public.segmentation_results set finished_at = now() - interval '1 year' where id = any ($1)"


async def found(queue: Queue, **wanted: Any) -> dict[str, Any]:
    answer: dict[str, Any] = await queue.store.ask("find", wanted={"most": 1000, **wanted})
    return answer


async def prune(queue: Queue, ended: str = "done", after: Any = None, most: int = 100) -> dict[str, Any]:
    answer: dict[str, Any] = await queue.store.ask("prune", ended=ended, before="2100-01-01T00:00:00Z", after=after, most=most)
    return answer


async def finished(queue: Queue, count: int = 1) -> list[str]:
    """Tasks that ended well a year ago."""
    ids = await queue.insert(count)
    await queue.settle(await queue.claim(new_id(), count), Fate.DONE)
    await queue.sql.execute(OLD, ids)
    return ids


async def test_active_tasks_are_found_page_by_page_in_either_order_each_once(queue: Queue) -> None:
    ids = [(await queue.insert())[0] for _ in range(7)]
    for newest_first in (False, True):
        pages, after, until = [], None, None
        for _ in range(4):
            page = await found(queue, most=2, after=after, until=until, newest_first=newest_first)
            pages.append(page["ids"])
            after, until = page["after"], page["until"]
        assert [task for page in pages for task in page] == (ids[::-1] if newest_first else ids)
        assert [len(page) for page in pages] == [2, 2, 2, 1]


async def test_what_is_inserted_after_the_first_page_is_in_none_of_the_others(queue: Queue) -> None:
    await queue.insert(3)
    page = await found(queue, most=2)
    assert page["count"] == 3
    await queue.insert(3)
    rest = await found(queue, after=page["after"], until=page["until"])
    assert (rest["count"], len(rest["ids"])) == (1, 1)


async def test_tasks_are_found_by_kind_project_age_id_and_error(queue: Queue) -> None:
    stranger = await queue.new_owner()
    (visual, old) = await queue.insert(2)
    (everything,) = await queue.insert(kind=KINDS[1])
    (foreign,) = await queue.insert(owner=stranger)
    await queue.sql.execute("update public.segmentation_results set created_at = now() - interval '3 h' where id = $1", old)
    assert set((await found(queue))["ids"]) == {visual, old, everything, foreign}
    assert (await found(queue, kinds=[KINDS[1]]))["ids"] == [everything]
    assert (await found(queue, project=stranger.project_id))["ids"] == [foreign]
    assert (await found(queue, older_seconds=7200))["ids"] == [old]
    assert (await found(queue, ids=[visual, new_id()]))["ids"] == [visual]
    await queue.settle(await queue.claim(new_id(), kinds=[KINDS[1]]), Fate.FAILED, code="internal", message="x")
    assert (await found(queue, failed=True, code="internal"))["ids"] == [everything]
    assert (await found(queue, failed=True, code="timeout"))["count"] == 0
    assert everything not in (await found(queue))["ids"]


async def test_many_are_cancelled_at_once_and_what_had_not_begun_is_refunded(queue: Queue) -> None:
    who: Person = await person(queue.sql, 100)
    made = [(await create(queue.sql, who, "segment_everything"))["id"] for _ in range(5)]
    (running,) = await queue.claim(new_id(), 1)
    answer = await queue.store.ask("cancel", ids=[*made, new_id()])
    assert answer == {"canceled": 5, "running": 1, "refunded": 8, "busy": []}
    assert await queue.sql.fetchval("select credits from public.users_profile where id = $1", who.id) == 98
    assert await queue.settle([running]) == {running.id: "lost"}
    again = await queue.store.ask("cancel", ids=made)
    assert again == {"canceled": 5, "running": 0, "refunded": 0, "busy": []}


async def test_rows_that_somebody_holds_are_busy_and_nobody_is_waited_for(queue: Queue) -> None:
    ids = await queue.insert(3)
    async with queue.sql.transaction():
        await queue.sql.execute("select from public.segmentation_results where id = $1 for update", ids[0])
        answer = await queue.store.ask("cancel", ids=ids)
    assert (answer["canceled"], answer["busy"]) == (2, [ids[0]])
    assert (await queue.store.ask("cancel", ids=answer["busy"]))["canceled"] == 1


async def test_a_chain_of_which_somebody_holds_a_part_is_busy_as_a_whole(queue: Queue) -> None:
    (first, other) = await queue.insert(2)
    second = await child_of(queue, first)
    third = await child_of(queue, second)
    async with queue.sql.transaction():
        await queue.sql.execute("select from public.segmentation_results where id = $1 for update", third)
        with anyio.fail_after(4):  # it would give up after five seconds
            answer = await queue.store.ask("cancel", ids=[first, other])
    assert (answer["canceled"], answer["busy"]) == (1, [first])
    assert await queue.statuses() == {"pending": 1, "waiting": 2, "canceled": 1}
    assert (await queue.store.ask("cancel", ids=[first]))["canceled"] == 1
    assert await queue.statuses() == {"canceled": 2, "error": 2}


@pytest.mark.parametrize("by", ["cancel", "settle", "delete"])
async def test_while_a_row_is_waited_for_no_profile_is_held(queue: Queue, database: Database, by: str) -> None:
    """Or a refund that holds that row and waits for the profile would be a deadlock."""
    await queue.sql.execute("insert into public.users_profile (id, credits) values ($1, 100)", queue.owner.user_id)
    (parent,) = await queue.insert()
    child = await child_of(queue, parent)
    await queue.sql.execute("update public.segmentation_results set charged = 1")
    claimed = await queue.claim(new_id(), 1) if by == "settle" else ()
    other = await database.connect()

    async def end() -> None:
        if by == "settle":
            await queue.settle(claimed, Fate.FAILED)
        elif by == "delete":
            await other.execute("delete from public.segmentation_results where id = $1", parent)
        else:
            await other.fetch("select maskd.cancel(array[$1::uuid])", parent)

    async with anyio.create_task_group() as tasks, queue.sql.transaction():
        await queue.sql.execute("select from public.segmentation_results where id = $1 for update", child)
        tasks.start_soon(end)
        while not await queue.sql.fetchval("select exists (select from pg_locks where not granted)"):
            await anyio.lowlevel.checkpoint()
        await queue.sql.execute("select from public.users_profile where id = $1 for update nowait", queue.owner.user_id)
    await other.close()
    assert await queue.sql.fetchval("select credits from public.users_profile") == 102


async def test_a_failed_chain_is_put_back_as_a_whole_whatever_the_order_it_is_named_in(queue: Queue) -> None:
    (parent,) = await queue.insert()
    chain = [parent]
    for _ in range(2):
        chain.append(await child_of(queue, chain[-1]))
    await queue.settle(await queue.claim(new_id()), Fate.FAILED, code="internal", message="x")
    assert await queue.store.ask("retry_some", ids=chain[::-1]) == {"retried": 3}
    assert [(await queue.row(task))["status"] for task in chain] == ["pending", "waiting", "waiting"]


async def test_a_paused_kind_waits_alone_and_none_of_it_ends_as_unserved(queue: Queue) -> None:
    (held,) = await queue.insert()
    await queue.insert(kind=KINDS[1])
    answer = await queue.store.ask("pause", names=[KINDS[0]], stop=True)
    assert (answer["changed"], answer["paused"]) == ([KINDS[0]], [KINDS[0]])
    assert {task.kind for task in await queue.claim(new_id())} == {KINDS[1]}
    await queue.sql.execute("update maskd.kinds set served_at = null; select maskd.end_unserved(-1)")
    assert (await queue.row(held))["status"] == "pending"
    assert await queue.store.ask("paused") == [KINDS[0]]
    state = {kind["kind"]: kind["paused"] for kind in (await queue.store.status())["kinds"]}
    assert [kind for kind, paused in state.items() if paused] == [KINDS[0]]


async def test_a_resumed_kind_is_claimed_again_and_has_all_its_time_to_be_served(queue: Queue) -> None:
    (held,) = await queue.insert()
    await queue.store.ask("pause", names=[KINDS[0]], stop=True)
    await queue.sql.execute("update public.segmentation_results set pending_at = now() - interval '1 day'")
    before = (await queue.row(held))["updated_at"]
    answer = await queue.store.ask("pause", names=[], stop=False)
    assert (answer["changed"], answer["paused"]) == ([KINDS[0]], [])
    assert (await queue.row(held))["updated_at"] > before, "Realtime tells of rows only"
    await queue.sql.execute("select maskd.end_unserved(600)")
    assert [task.id for task in await queue.claim(new_id())] == [held]


async def test_a_kind_that_there_is_not_is_told_and_nothing_is_paused(queue: Queue) -> None:
    answer = await queue.store.ask("pause", names=[KINDS[0], "segment_visuel"], stop=True)
    assert answer["unknown"] == ["segment_visuel"]
    assert set(KINDS) <= set(answer["known"])
    assert await queue.store.ask("paused") == []


async def test_old_tasks_go_page_by_page_and_their_blobs_are_due_at_once(queue: Queue) -> None:
    await finished(queue, 5)
    young = (await queue.insert())[0]
    await queue.settle(await queue.claim(new_id()), Fate.DONE)
    old = await queue.store.ask("prunable", kept={"done": 86400, "error": 0, "canceled": None})
    assert (old["done"]["count"], old["error"]["count"], "canceled" in old) == (5, 0, False)
    deleted, after = 0, None
    for _ in range(3):
        answer = await queue.store.ask("prune", ended="done", before=old["done"]["before"], after=after, most=2)
        deleted, after = deleted + answer["deleted"], answer["after"]
    assert deleted == 5
    assert (await queue.store.ask("prune", ended="done", before=old["done"]["before"], after=after, most=2))["after"] is None
    assert [row[0] for row in await queue.sql.fetch("select id::text from public.segmentation_results")] == [young]
    assert len(await queue.store.tombstones(100)) == 5


async def child_of(queue: Queue, parent: str, **columns: Any) -> str:
    """A task after another."""
    return await naming(queue, after=parent, **columns)


async def naming(queue: Queue, **columns: Any) -> str:
    """A task with these columns."""
    columns = {"project_id": queue.owner.project_id, "kind": KINDS[0], **columns}
    columns.setdefault("source_image_url", f"uploads/{queue.owner.user_id}/a.jpg")
    places = ", ".join(f"${place}" for place in range(1, len(columns) + 1))
    return await queue.sql.fetchval(
        f"insert into public.segmentation_results ({', '.join(columns)}) values ({places}) returning id::text", *columns.values()
    )


async def test_a_task_that_a_live_one_names_stays_until_that_one_is_over(queue: Queue) -> None:
    """By each way of naming, in each state of a live task."""
    parents = await finished(queue, 8)
    keys = [f"masks/{queue.owner.project_id}/{parent}/{new_id()}/result.png" for parent in parents]
    plain = parents[1].replace("-", "").upper()
    live = [
        await naming(queue, after=parents[0]),
        await naming(queue, params=json.dumps({"objects": [{"mask": {"task_id": plain, "mask_ids": [1]}}]})),
        await naming(queue, params=json.dumps({"layers": [{"mask": {"image_url": keys[2]}}]})),
        await naming(queue, source_image_url=keys[3]),
        await naming(queue, params=json.dumps({"masks": [{"task_id": parents[4]}]})),
        await naming(queue, after=parents[5]),
    ]
    await queue.sql.execute(
        "update public.segmentation_results set status = 'delayed', run_after = now() + interval '1 h' where id = any ($1)",
        live[4:],
    )
    assert len(await queue.claim(new_id(), 2)) == 2
    answer = await prune(queue)
    assert (answer["deleted"], answer["kept"]) == (2, 6)
    await queue.store.ask("cancel", ids=live)
    assert (await prune(queue))["deleted"] == 6
    assert {row[0] for row in await queue.sql.fetch("select id::text from public.segmentation_results")} == set(live)


async def test_a_row_that_somebody_holds_or_that_goes_back_is_not_pruned(queue: Queue) -> None:
    held, free = await finished(queue, 2)
    async with queue.sql.transaction():
        await queue.sql.execute("select from public.segmentation_results where id = $1 for share", held)
        answer = await prune(queue)
    assert (answer["deleted"], answer["kept"]) == (1, 1)
    assert [row[0] for row in await queue.sql.fetch("select id::text from public.segmentation_results")] == [held]
    assert free != held


async def test_a_task_that_comes_while_its_parent_is_pruned_waits_and_is_told_that_it_is_gone(queue: Queue) -> None:
    (parent,) = await finished(queue)
    async with anyio.create_task_group() as tasks, queue.sql.transaction():
        await queue.sql.execute("select maskd.prune('done', now(), null, 10)")
        arguments = (queue.owner, KINDS[0], None, {}, None, None, parent)
        tasks.start_soon(lambda: queue.client.insert(*arguments))
        while not await queue.sql.fetchval("select count(*) from pg_locks where not granted"):
            await anyio.lowlevel.checkpoint()
    rows = await queue.sql.fetch("select status, error ->> 'code' from public.segmentation_results")
    assert [tuple(row) for row in rows] == [("error", "after_failed")]


async def test_rows_that_nobody_here_finished_are_never_pruned(queue: Queue) -> None:
    await finished(queue, 1)
    await queue.sql.execute("update public.segmentation_results set finished_at = null")
    assert (await prune(queue))["deleted"] == 0


async def test_lost_workers_and_moot_tombstones_go(queue: Queue) -> None:
    alive, silent = new_id(), new_id()
    for worker in (alive, silent):
        await queue.beat(worker)
    await queue.silence(silent, 2 * 86400)
    (done,) = await finished(queue)
    await queue.sql.execute(
        """insert into maskd.tombstones (project_id, task_id, claim_token, due_at)
           select project_id, id, claim_token, now() - interval '2 h' from public.segmentation_results where id = $1""",
        done,
    )
    answer = await queue.store.ask("prune_leftovers")
    assert (answer["workers"], answer["tombstones"], answer["due"]) == (1, 1, 0)
    assert [row[0] for row in await queue.sql.fetch("select id::text from maskd.workers")] == [alive]


async def test_an_attempt_owns_its_blobs_while_its_task_runs_or_once_it_is_done_under_it(queue: Queue) -> None:
    await queue.insert(3)
    running, done, failed = await queue.claim(new_id(), 3)
    await queue.settle([done])
    await queue.settle([failed], Fate.FAILED, code="internal", message="x")
    tasks = (running, done, failed, running)
    tokens = [running.token, done.token, failed.token, new_id()]
    owning = await queue.store.ask("owning", ids=[task.id for task in tasks], tokens=tokens)
    assert set(owning) == {running.token, done.token}


async def test_batches_and_the_status_read_the_table_by_its_indexes_however_long_it_is(queue: Queue) -> None:
    """By counters of the server itself: pages, rows that were looked at."""
    await queue.sql.execute("set session_replication_role = replica")
    await queue.sql.execute(
        """insert into public.segmentation_results (project_id, user_id, kind, status, finished_at, created_at)
           select $1, $2, 'segment_visual', (array['done', 'done', 'error', 'canceled'])[n % 4 + 1],
                  now() - make_interval(mins => n), now() - make_interval(mins => n + 1) from generate_series(1, 20000) n""",
        queue.owner.project_id,
        queue.owner.user_id,
    )
    await queue.sql.execute("reset session_replication_role")
    await queue.insert(20)
    await queue.sql.execute("analyze public.segmentation_results")
    calls = {
        "select maskd.prune('done', now() - interval '5 d', null, 100)": 900,
        "select maskd.find('{\"most\": 10}')": 200,
        'select maskd.prunable(\'{"done": 86400, "error": 86400}\')': 20_000,
        "select maskd.status()": 300,
        "select maskd.cancel_some(array(select id from public.segmentation_results where status = 'pending'))": 900,
    }
    for call, most in calls.items():
        async with queue.sql.transaction():
            before = await queue.sql.fetchrow(READS)
            await queue.sql.fetch(call)
            after = await queue.sql.fetchrow(READS)
        assert after["scans"] == before["scans"], call
        assert after["rows"] - before["rows"] <= most, call


async def test_status_tells_rates_and_how_long_tasks_took(queue: Queue) -> None:
    await queue.insert(6)
    tasks = await queue.claim(new_id())
    await queue.settle(tasks[:3])
    await queue.settle(tasks[3:5], Fate.FAILED, code="timeout", message="too slow")
    status = await queue.store.status()
    (rate,) = status["rates"]
    assert (rate["kind"], rate["done_per_second"], rate["failed_per_second"]) == (KINDS[0], 0.05, 0.03)
    assert 0 <= rate["seconds_p50"] <= rate["seconds_p95"] < 60
    assert [(row["status"], row["count"]) for row in status["tasks"]] == [("processing", 1)]
    assert {error["code"] for error in status["errors"]} == {"timeout"}
    assert all(error["ago_seconds"] >= 0 for error in status["errors"])
