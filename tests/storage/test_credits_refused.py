"""Credits when things go wrong: refunds that the database refuses, locks taken crosswise, others' projects, types in the way."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import asyncpg
import pytest
from support.database import Database
from support.people import as_user, create, credits, person
from support.stores import Queue, new_id

from storage.base import ConfigurationError, Fate
from storage.migrate import migrate
from storage.schema import plain_file

pytestmark = pytest.mark.anyio

ADD = "insert into public.segmentation_results (project_id, kind, source_image_url) values ($1::text::uuid, $2, $3) returning id"
BLOCKED = """select count(*) from pg_stat_activity
              where datname = current_database() and cardinality(pg_blocking_pids(pid)) > 0"""
REFUSALS = {
    "the balance is full": f"update public.users_profile set credits = {2**31 - 1} where id = '{{who}}'",
    "a check of the project": "alter table public.users_profile add check (credits <= 2 or id <> '{who}')",
    "a trigger of the project": """
        create function public.no() returns trigger language plpgsql as
          $$ begin raise exception 'no' using errcode = 'PT418'; end $$;
        create trigger no before update on public.users_profile for each row
          when (new.credits > old.credits and new.id = '{who}') execute function public.no()""",
    "the user is gone and the tasks are not": """
        alter table public.users_profile drop constraint users_profile_id_fkey;
        alter table public.projects drop constraint projects_user_id_fkey;
        delete from auth.users where id = '{who}'""",
}


@pytest.fixture
async def queue(database: Database) -> AsyncIterator[Queue]:
    opened = await Queue.open(database)
    yield opened
    await opened.close()


@pytest.mark.parametrize("refusal", REFUSALS)
async def test_a_refund_that_is_refused_keeps_no_task_from_ending_and_can_be_seen(queue: Queue, refusal: str) -> None:
    who, other = await person(queue.sql, 5), await person(queue.sql, 5)
    worker, ids = new_id(), [(await create(queue.sql, each))["id"] for each in (who, who, other)]
    tasks = await queue.claim(worker)
    idle = [(await create(queue.sql, who))["id"]]
    await queue.sql.execute(REFUSALS[refusal].format(who=who.id))
    failed = [task for task in tasks if task.id != ids[1]]
    assert await queue.settle(failed, Fate.FAILED, code="internal", message="x") == {}
    await queue.sql.execute("update public.segmentation_results set deaths = 3 where id = $1", ids[1])
    assert await queue.store.bury(worker, [ids[1]]) == 1
    (canceled,) = await queue.sql.fetch("select was, refunded from maskd.cancel($1::text[]::uuid[])", idle)
    assert tuple(canceled) == ("pending", 0)
    assert await queue.statuses() == {"error": 3, "canceled": 1}
    assert [(await queue.row(task_id))["charged"] for task_id in (*ids, *idle)] == [1, 1, 0, 1]
    assert await credits(queue.sql, other) == 5
    assert await queue.sql.fetchval("select count(*) from public.usage_logs where action = 'refund'") == 1


async def test_a_waiting_task_can_be_cancelled_while_the_one_before_it_fails(queue: Queue, database: Database) -> None:
    who = await person(queue.sql, 9)
    first = await create(queue.sql, who)
    child = (await create(queue.sql, who, after=first["id"]))["id"]
    failing = await queue.claim(new_id())
    canceler = await database.connect()
    try:
        async with canceler.transaction():  # a cancel, stopped after its first statement
            await canceler.execute("select from public.segmentation_results where id = $1 for update", child)
            settled = asyncio.create_task(queue.settle(failing, Fate.FAILED, code="internal", message="x"))
            while await queue.sql.fetchval(BLOCKED) == 0:
                pass
            await canceler.execute("select from maskd.cancel(array[$1::uuid])", child)
        assert await settled == {}
    finally:
        await canceler.close()
    assert (await credits(queue.sql, who), await queue.statuses()) == (9, {"error": 1, "canceled": 1})


async def test_a_row_for_the_project_of_another_learns_nothing_of_their_queue(queue: Queue) -> None:
    await queue.sql.execute("update maskd.settings set value = '1' where key = 'active_rows_max'")
    who, other = await person(queue.sql, 5), await person(queue.sql, 5)
    await create(queue.sql, other)
    for project in (other.project, new_id()):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            await as_user(queue.sql, who.id, ADD, project, "segment_visual", who.image)


async def test_what_is_refused_is_stored_short(queue: Queue) -> None:
    who = await person(queue.sql, 5)
    await as_user(queue.sql, who.id, ADD, who.project, "k" * 100_000, "x" * 100_000)
    row = await queue.sql.fetchrow("select length(kind), length(source_image_url), status from public.segmentation_results")
    assert tuple(row) == (200, 2000, "error")


@pytest.mark.parametrize("shadowed", ["text", "jsonb", "uuid"])
async def test_a_type_laid_in_the_way_gets_none_of_our_rights(queue: Queue, database: Database, shadowed: str) -> None:
    who = await person(queue.sql, 5)
    task = (await create(queue.sql, who))["id"]
    await queue.sql.execute("create table public.ran_as (role name); grant insert on public.ran_as to public")
    user = await database.connect()
    try:
        await user.execute("set session authorization authenticated")
        await user.execute("select set_config('request.jwt.claims', $1, false)", json.dumps({"sub": who.id}))
        await user.execute(f"""
            create function pg_temp.trap(v pg_catalog.{shadowed}) returns boolean language plpgsql as
              $$ begin insert into public.ran_as values (current_user); return true; end $$;
            create domain pg_temp.{shadowed} as pg_catalog.{shadowed} check (pg_temp.trap(value))""")
        await user.execute(f"""
            insert into public.segmentation_results (project_id, source_image_url) values ('{who.project}', '{who.image}');
            select public.create_segmentation('{who.project}', 'segment_visual', '{who.image}');
            select public.cancel_segmentation('{task}')""")
    finally:
        await user.close()
    assert await queue.sql.fetch("select distinct role from public.ran_as where role <> 'authenticated'") == []
    assert (await queue.row(task))["status"] == "canceled"


async def test_a_usage_log_whose_check_would_refuse_a_refund_is_named(empty_database: Database) -> None:
    empty_database.execute(
        plain_file().read_text()
        + """create table public.usage_logs (id uuid primary key default gen_random_uuid(),
               credits_used integer check (credits_used >= 0));"""
    )
    with pytest.raises(ConfigurationError, match=r'"usage_logs_credits_used_check"; actions are .* widen or drop that check'):
        await migrate(empty_database.dsn, plain=False, dry_run=False, said=lambda _: None)
