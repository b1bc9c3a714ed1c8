"""What tasks cost: creating, cancelling, refunds, and what a request sent twice does; at the SQL functions, as a user."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest
from support.database import Database
from support.people import Person, as_role, as_user, cancel, create, credits, person, used
from support.stores import Queue, new_id

from storage.base import ConfigurationError, Fate, Outcome
from storage.migrate import migrate
from storage.postgres import PostgresStore
from storage.schema import plain_file

pytestmark = pytest.mark.anyio

PLAIN = """insert into public.segmentation_results (project_id, kind, source_image_url, idempotency_key)
           values ($1::text::uuid, $2, $3, $4) returning id::text, status, charged, error"""


@pytest.fixture
async def queue(database: Database) -> AsyncIterator[Queue]:
    opened = await Queue.open(database)
    yield opened
    await opened.close()


async def insert(queue: Queue, who: Person, kind: str = "segment_visual", key: str | None = None) -> asyncpg.Record:
    """What supabase-js does with a user's token."""
    (row,) = await as_user(queue.sql, who.id, PLAIN, who.project, kind, who.image, key)
    return row


def refused(error: pytest.ExceptionInfo[asyncpg.PostgresError]) -> tuple[str, str]:
    return error.value.sqlstate, error.value.detail


async def test_a_created_task_is_paid_logged_and_pending(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    made = await create(queue.sql, who, "segment_everything", params={"points_per_side": 8})
    assert made == {"id": made["id"], "status": "pending", "charged": 2, "error": None, "repeated": False, "credits": 3}
    row = await queue.row(made["id"])
    assert (str(row["user_id"]), row["kind"], json.loads(row["params"]), row["charged"]) == (
        who.id,
        "segment_everything",
        {"points_per_side": 8},
        2,
    )
    assert await used(queue.sql, who) == [("segment_everything", 2)]


async def test_a_plain_insert_is_charged_the_same(queue: Queue) -> None:
    who = await person(queue.sql, 1)
    assert tuple(await insert(queue, who))[1:] == ("pending", 1, None)
    assert (await credits(queue.sql, who), await used(queue.sql, who)) == (0, [("segment_visual", 1)])
    with pytest.raises(asyncpg.PostgresError) as error:
        await insert(queue, who)
    assert refused(error) == ("PT402", "credits_missing")
    assert await queue.statuses() == {"pending": 1}


async def test_a_charge_that_is_forged_is_no_columns_of_the_user(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    for forged in (
        "charged",
        "priority",
        "user_id",
        "attempts",
        "claim_token",
        "fair_rank",
        "max_attempts",
        "created_at",
        "run_after",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await as_user(
                queue.sql, who.id, f"insert into public.segmentation_results (project_id, {forged}) values (null, null)"
            )


async def test_the_price_is_that_of_the_tier_and_an_unknown_tier_pays_as_the_free_one(queue: Queue) -> None:
    await queue.sql.execute("update maskd.prices set credits = 7 where kind = 'segment_visual' and tier = 'free'")
    await queue.sql.execute("update maskd.prices set credits = 3 where kind = 'segment_visual' and tier = 'pro'")
    prices = {tier: (await create(queue.sql, await person(queue.sql, 9, tier)))["charged"] for tier in ("free", "pro", "gold")}
    assert prices == {"free": 7, "pro": 3, "gold": 7}


async def test_what_costs_nothing_needs_no_profile(queue: Queue) -> None:
    who = await person(queue.sql)
    assert (await create(queue.sql, who, "convert_image"))["charged"] == 0
    with pytest.raises(asyncpg.PostgresError, match="costs 1 credits and 0 are left") as error:
        await create(queue.sql, who)
    assert refused(error) == ("PT402", "credits_missing")


@pytest.mark.parametrize("way", ["create", "insert"])
async def test_twenty_at_once_on_two_credits_are_exactly_two(queue: Queue, database: Database, way: str) -> None:
    who = await person(queue.sql, 2)

    async def one() -> str:
        sql = await database.connect()
        try:
            if way == "create":
                await create(sql, who)
            else:
                await as_user(sql, who.id, PLAIN, who.project, "segment_visual", who.image, None)
        except asyncpg.PostgresError as error:
            return str(error.sqlstate)
        finally:
            await sql.close()
        return "made"

    ends = await asyncio.gather(*[one() for _ in range(20)])
    assert sorted(ends) == ["PT402"] * 18 + ["made"] * 2
    assert (await credits(queue.sql, who), await queue.statuses(), len(await used(queue.sql, who))) == (0, {"pending": 2}, 2)


@pytest.mark.parametrize("copies", [1, 8])
async def test_a_request_sent_again_is_one_task_paid_once(queue: Queue, database: Database, copies: int) -> None:
    who = await person(queue.sql, 5)

    async def one() -> dict[str, Any]:
        sql = await database.connect()
        try:
            return await create(sql, who, params={"points": [[1, 2]]}, idempotency_key="k")
        finally:
            await sql.close()

    first = await asyncio.gather(*[one() for _ in range(copies)])
    again = await one()
    assert len({made["id"] for made in [*first, again]}) == 1
    assert [made["repeated"] for made in first].count(False) == 1
    assert again["repeated"]
    assert await credits(queue.sql, who) == 4


async def test_another_task_under_the_same_key_is_a_conflict_and_another_project_is_not(queue: Queue) -> None:
    who, other = await person(queue.sql, 5), await person(queue.sql, 5)
    await create(queue.sql, who, idempotency_key="k")
    with pytest.raises(asyncpg.PostgresError) as error:
        await create(queue.sql, who, idempotency_key="k", params={"points": [[1, 2]]})
    assert refused(error) == ("PT409", "idempotency_conflict")
    with pytest.raises(asyncpg.UniqueViolationError):
        await insert(queue, who, key="k")
    assert not (await create(queue.sql, other, idempotency_key="k"))["repeated"]
    assert (await credits(queue.sql, who), await credits(queue.sql, other)) == (4, 4)


async def test_an_insert_that_meets_a_conflict_and_does_nothing_costs_nothing(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    await insert(queue, who, key="k")
    ignored = f"{PLAIN.split(' returning')[0]} on conflict do nothing"
    await as_user(queue.sql, who.id, ignored, who.project, "segment_visual", who.image, "k")
    assert (await credits(queue.sql, who), await used(queue.sql, who)) == (4, [("segment_visual", 1)])


@pytest.mark.parametrize(
    ("asked", "state", "code"),
    [
        ({"project_id": new_id()}, "PT404", "project_unknown"),
        ({"project_id": None}, "PT404", "project_unknown"),
        ({"kind": "segment_dreams"}, "PT400", "kind_unknown"),
        ({"source_image_url": "uploads/somebody/a.jpg"}, "PT400", "image_url_forbidden"),
        ({"params": {"masks": [{"image_url": "uploads/somebody/a.png"}]}}, "PT400", "image_url_forbidden"),
        ({"params": [1]}, "PT400", "params_invalid"),
        ({"params": {"points": [[1, 2]] * 20000}}, "PT400", "params_invalid"),
        ({"text_prompt": "x" * 1001}, "PT400", "params_invalid"),
        ({"after": new_id()}, "PT400", "after_failed"),
        ({"idempotency_key": "x" * 201}, "PT400", "params_invalid"),
    ],
)
async def test_what_can_never_be_done_is_refused_with_a_code_and_nothing_is_stored(
    queue: Queue, asked: dict[str, Any], state: str, code: str
) -> None:
    who = await person(queue.sql, 5)
    with pytest.raises(asyncpg.PostgresError) as error:
        await create(queue.sql, who, **asked)
    assert refused(error) == (state, code)
    assert (await credits(queue.sql, who), await queue.statuses(), await used(queue.sql, who)) == (5, {}, [])


async def test_a_plain_insert_that_can_never_be_done_is_stored_as_an_error_and_free(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    assert tuple(await insert(queue, who, "segment_dreams"))[1:3] == ("error", 0)
    assert await credits(queue.sql, who) == 5


async def test_the_project_of_another_user_is_unknown(queue: Queue) -> None:
    who, other = await person(queue.sql, 5), await person(queue.sql, 5)
    with pytest.raises(asyncpg.PostgresError) as error:
        await create(queue.sql, who, project_id=other.project)
    assert refused(error) == ("PT404", "project_unknown")


async def test_a_token_without_a_user_is_told_to_sign_in(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    with pytest.raises(asyncpg.PostgresError) as error:
        await as_role(queue.sql, "authenticated", {}, "select public.create_segmentation($1::text::uuid)", who.project)
    assert refused(error) == ("PT401", "unauthorized")


@pytest.mark.parametrize("way", ["pending", "waiting"])
async def test_too_many_waiting_tasks_are_refused_however_they_wait(queue: Queue, way: str) -> None:
    await queue.sql.execute("update maskd.settings set value = '3' where key = 'active_rows_max'")
    who = await person(queue.sql, 50)
    first = await create(queue.sql, who)
    for _ in range(2):
        await create(queue.sql, who, after=first["id"] if way == "waiting" else None)
    with pytest.raises(asyncpg.PostgresError) as error:
        await create(queue.sql, who, after=first["id"] if way == "waiting" else None)
    assert refused(error) == ("PT429", "too_many_tasks")
    assert await credits(queue.sql, who) == 47


async def test_the_service_inserts_freely_and_charges_when_it_says_so(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    plain = "insert into public.segmentation_results (project_id, kind, source_image_url, charged) values ($1, $2, $3, $4)"
    for kind, charged in (("segment_visual", 0), ("fill_object", 1)):
        await as_role(queue.sql, "service_role", {"role": "service_role"}, plain, who.project, kind, who.image, charged)
    assert (await credits(queue.sql, who), await used(queue.sql, who)) == (0, [("fill_object", 5)])


async def test_a_role_that_is_neither_pays_as_a_user(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    role = f"maskd_clerk_{new_id()[:8]}"
    await queue.sql.execute(f"create role {role} in role authenticated")
    try:
        claims = {"sub": who.id, "role": role}
        await as_role(queue.sql, role, claims, PLAIN, who.project, "segment_visual", who.image, None)
        other = await create(queue.sql, await person(queue.sql, 5))
        with pytest.raises(asyncpg.PostgresError, match="no such task"):
            await as_role(queue.sql, role, claims, "select public.cancel_segmentation($1::text::uuid)", other["id"])
    finally:
        await queue.sql.execute(f"drop role {role}")
    assert await credits(queue.sql, who) == 4


@pytest.mark.parametrize("fate", [Fate.FAILED, Fate.RETRY])
async def test_a_failure_refunds_once_and_a_retry_by_hand_is_free(queue: Queue, fate: Fate) -> None:
    who = await person(queue.sql, 5)
    made = await create(queue.sql, who)
    await queue.sql.execute("update public.segmentation_results set max_attempts = 1")
    (task,) = await queue.claim(new_id())
    for _ in range(2):
        await queue.settle([task], fate, code="internal", message="x")
    assert (await credits(queue.sql, who), (await queue.row(made["id"]))["charged"]) == (5, 0)
    await queue.sql.execute("select maskd.retry(null, 'internal', 10)")
    (task,) = await queue.claim(new_id())
    await queue.settle([task], Fate.FAILED, code="internal", message="x")
    assert await credits(queue.sql, who) == 5
    assert await used(queue.sql, who) == [("segment_visual", 1), ("refund", -1)]


async def test_a_chain_that_fails_is_refunded_as_a_whole(queue: Queue) -> None:
    who = await person(queue.sql, 9)
    first = await create(queue.sql, who)
    second = await create(queue.sql, who, "fill_object", after=first["id"])
    await create(queue.sql, who, after=second["id"])
    assert await credits(queue.sql, who) == 2
    (task,) = await queue.claim(new_id())
    await queue.settle([task], Fate.FAILED, code="image_missing", message="x")
    assert (await credits(queue.sql, who), await queue.statuses()) == (9, {"error": 3})


async def test_done_is_paid(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    await create(queue.sql, who)
    await queue.settle(await queue.claim(new_id()))
    assert (await credits(queue.sql, who), await queue.statuses()) == (4, {"done": 1})


async def test_a_cancelled_task_that_nobody_began_is_refunded_and_its_children_end(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    first = await create(queue.sql, who)
    child = await create(queue.sql, who, after=first["id"])
    assert await cancel(queue.sql, who, first["id"]) == {"id": first["id"], "status": "canceled", "canceled": True, "refunded": 1}
    assert await cancel(queue.sql, who, first["id"]) == {
        "id": first["id"],
        "status": "canceled",
        "canceled": False,
        "refunded": 0,
    }
    assert (await credits(queue.sql, who), (await queue.error(child["id"]))["code"]) == (5, "after_failed")


async def test_a_cancelled_task_that_a_worker_has_is_paid_its_blobs_go_and_its_late_result_is_lost(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    made = await create(queue.sql, who)
    worker = new_id()
    await queue.beat(worker)
    (task,) = await queue.claim(worker)
    assert (await cancel(queue.sql, who, made["id"]))["refunded"] == 0
    assert await queue.beat(worker, [task]) == [(task.id, task.token)]
    assert await queue.settle([task]) == {task.id: "lost"}
    assert (await credits(queue.sql, who), await queue.statuses()) == (4, {"canceled": 1})
    buried = await queue.sql.fetchrow("select task_id::text, claim_token::text from maskd.tombstones")
    assert tuple(buried) == (task.id, task.token)


async def test_a_task_that_has_ended_cannot_be_cancelled_and_that_of_another_is_unknown(queue: Queue) -> None:
    who, other = await person(queue.sql, 5), await person(queue.sql, 5)
    made = await create(queue.sql, who)
    with pytest.raises(asyncpg.PostgresError) as error:
        await cancel(queue.sql, other, made["id"])
    assert refused(error) == ("PT404", "task_unknown")
    await queue.settle(await queue.claim(new_id()))
    assert await cancel(queue.sql, who, made["id"]) == {"id": made["id"], "status": "done", "canceled": False, "refunded": 0}


async def test_deleting_refunds_what_nobody_began(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    for _ in range(2):
        await create(queue.sql, who)
    await queue.claim(new_id(), 1)
    assert await as_user(queue.sql, who.id, "delete from public.segmentation_results returning id") != []
    assert await credits(queue.sql, who) == 4
    assert await used(queue.sql, who) == [("segment_visual", 1), ("segment_visual", 1), ("refund", -1)]


async def test_a_user_with_paid_tasks_can_be_deleted(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    await create(queue.sql, who)
    await queue.sql.execute("delete from auth.users where id = $1", who.id)
    assert await queue.statuses() == {}


async def test_two_workers_that_fail_tasks_of_the_same_users_at_once_do_not_block_each_other(
    queue: Queue, database: Database
) -> None:
    people = [await person(queue.sql, 50) for _ in range(8)]
    for who in [*people, *reversed(people)] * 4:
        await create(queue.sql, who)
    stores = [PostgresStore(database.dsn) for _ in range(2)]
    try:
        settled = []
        for store, order in zip(stores, (1, -1), strict=True):
            await store.open()
            tasks = (await store.claim(new_id(), new_id(), ["segment_visual"], 32)).tasks
            settled.append(store.settle([Outcome(task.id, task.token, Fate.FAILED, code="internal") for task in tasks[::order]]))
        await asyncio.wait_for(asyncio.gather(*settled), 30)
    finally:
        for store in stores:
            await store.close()
    assert [await credits(queue.sql, who) for who in people] == [50] * 8


async def test_tables_whose_usage_log_demands_more_are_named(empty_database: Database) -> None:
    empty_database.execute(
        plain_file().read_text()
        + "create table public.usage_logs (id uuid primary key default gen_random_uuid(), reason text not null);"
    )
    with pytest.raises(ConfigurationError, match=r"public\.usage_logs\.reason may not be null"):
        await migrate(empty_database.dsn, plain=False, dry_run=False, said=lambda _: None)
