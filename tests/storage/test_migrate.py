"""Migrations: from nothing, twice, onto tables that were there before, and only where they can work."""

from __future__ import annotations

import asyncio
import json

import asyncpg
import pytest
from support.database import Database
from support.people import as_user

from storage.base import ConfigurationError
from storage.migrate import Plan, migrate
from storage.postgres import PostgresStore
from storage.schema import migration_files, plain_file

pytestmark = pytest.mark.anyio

OLD_TABLES = """
create type public.task_status as enum ('pending', 'processing', 'done', 'error');
create table public.users_profile (
  id uuid primary key references auth.users (id), tier text default 'free', credits integer default 10);
create table public.projects (
  id uuid primary key default gen_random_uuid(), user_id uuid not null references auth.users (id), name text);
create table public.segmentation_results (
  id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.projects (id),
  source_image_url text not null, mask_image_url text, text_prompt text not null,
  status public.task_status not null default 'pending', created_at timestamptz default now());
create table public.usage_logs (
  id uuid primary key default gen_random_uuid(), user_id uuid not null, action text, credits_used integer);
alter table public.segmentation_results enable row level security;
create policy anything on public.segmentation_results for all using (true) with check (true);
grant all on all tables in schema public to anon, authenticated, service_role;
"""


async def apply(database: Database, *, plain: bool = True, dry_run: bool = False) -> tuple[Plan, list[str]]:
    said: list[str] = []
    plan = await migrate(database.dsn, plain=plain, dry_run=dry_run, said=said.append)
    return plan, said


async def connected(database: Database) -> asyncpg.Connection:
    return await database.connect()


async def test_from_nothing_every_migration_is_applied_once_and_recorded_for_supabase_too(empty_database: Database) -> None:
    plan, _ = await apply(empty_database)
    assert len(plan.pending) == len(migration_files())
    again, said = await apply(empty_database)
    assert (again.pending, len(said)) == ((), 1)
    sql = await connected(empty_database)
    recorded = await sql.fetch("select version from supabase_migrations.schema_migrations order by 1")
    assert [row[0] for row in recorded] == [file.name[:14] for file in migration_files()]
    await sql.close()


async def test_supabases_history_has_the_text_of_what_ran_also_where_an_earlier_maskd_left_it_out(
    empty_database: Database,
) -> None:
    await apply(empty_database)
    empty_database.execute("update supabase_migrations.schema_migrations set statements = null where name = 'claim'")
    await apply(empty_database)
    sql = await connected(empty_database)
    kept = await sql.fetch("select statements from supabase_migrations.schema_migrations order by version")
    assert [f"{row[0][0]};" for row in kept] == [file.read_text().strip() for file in migration_files()]
    await sql.close()


async def test_every_migration_may_run_again_without_harm(empty_database: Database) -> None:
    await apply(empty_database)
    for file in [plain_file(), *migration_files()]:
        empty_database.execute(file.read_text())


async def test_of_two_who_migrate_at_once_each_file_is_applied_by_one(empty_database: Database) -> None:
    (_, said), (_, also_said) = await asyncio.gather(apply(empty_database), apply(empty_database))
    applied = [line for line in [*said, *also_said] if line.startswith("apply ")]
    assert sorted(applied) == [f"apply {file.name}" for file in migration_files()]


async def test_a_dry_run_changes_nothing(empty_database: Database) -> None:
    plan, said = await apply(empty_database, dry_run=True)
    assert (len(plan.pending), said, plan.lacks_supabase) == (len(migration_files()), [], True)
    sql = await connected(empty_database)
    assert await sql.fetchval("select to_regclass('public.segmentation_results')") is None
    await sql.close()


async def test_a_plain_postgres_is_refused_with_the_command_that_helps(empty_database: Database) -> None:
    with pytest.raises(ConfigurationError, match="maskd migrate --plain"):
        await apply(empty_database, plain=False)


async def test_a_history_that_is_not_ours_is_left_alone(empty_database: Database) -> None:
    empty_database.execute(
        "create schema supabase_migrations;"
        "create table supabase_migrations.schema_migrations (version text primary key, name text);"
        "insert into supabase_migrations.schema_migrations values ('20200101000000', 'theirs')"
    )
    plan, _ = await apply(empty_database)
    assert plan.foreign_history
    sql = await connected(empty_database)
    assert await sql.fetchval("select count(*) from supabase_migrations.schema_migrations") == 1
    await sql.close()


async def test_a_daemon_refuses_a_schema_that_is_not_there_or_not_complete(empty_database: Database) -> None:
    store = PostgresStore(empty_database.dsn)
    with pytest.raises(ConfigurationError, match="maskd migrate"):
        await store.open()
    await apply(empty_database)
    empty_database.execute("delete from maskd.migrations where name = 'lease'")
    with pytest.raises(ConfigurationError, match="maskd migrate"):
        await store.open()
    await store.close()


async def test_tables_that_were_there_before_are_adopted_and_their_rows_are_not_touched(empty_database: Database) -> None:
    empty_database.execute(plain_file().read_text() + OLD_TABLES)
    sql = await connected(empty_database)
    user = await sql.fetchval("insert into auth.users default values returning id")
    project = await sql.fetchval("insert into public.projects (user_id) values ($1) returning id", user)
    old = await sql.fetchval(
        """insert into public.segmentation_results (project_id, source_image_url, text_prompt, status)
           values ($1, 'a', 'b', 'done') returning id""",
        project,
    )
    await apply(empty_database, plain=False)
    row = await sql.fetchrow("select status, text_prompt, kind, attempts from public.segmentation_results where id = $1", old)
    assert tuple(row) == ("done", "b", "segment_concept", 0)
    new = await sql.fetchrow(
        """insert into public.segmentation_results (project_id, kind, source_image_url)
           values ($1, 'segment_visual', $2) returning status, user_id""",
        project,
        f"uploads/{user}/a.jpg",
    )
    assert tuple(new) == ("pending", user)
    await sql.close()


async def test_on_adopted_tables_users_cannot_forge_what_old_grants_and_policies_let_them(empty_database: Database) -> None:
    empty_database.execute(plain_file().read_text() + OLD_TABLES)
    await apply(empty_database, plain=False)
    sql = await connected(empty_database)
    user = await sql.fetchval("insert into auth.users default values returning id")
    await sql.execute("insert into public.users_profile (id, credits) values ($1, 5)", user)
    for forged in (
        "update public.segmentation_results set status = 'done'",
        "update public.users_profile set credits = 1000",
        "insert into public.usage_logs (user_id, action, credits_used) values (auth.uid(), 'x', -5)",
        "insert into public.segmentation_results (project_id, priority) values (gen_random_uuid(), 99)",
        "select claim_token from public.segmentation_results",
        "select * from maskd.workers",
        "select * from maskd.claim(gen_random_uuid(), gen_random_uuid(), '{segment_visual}', 10)",
    ):
        with pytest.raises(asyncpg.InsufficientPrivilegeError):
            await as_user(sql, str(user), forged)
    await sql.close()


async def test_a_user_may_insert_for_own_projects_only_and_sees_own_rows_only(database: Database) -> None:
    sql = await connected(database)
    mine, theirs = [await sql.fetchval("insert into auth.users default values returning id::text") for _ in range(2)]
    project = await sql.fetchval("insert into public.projects (user_id) values ($1) returning id::text", mine)
    await sql.execute("insert into public.users_profile (id, credits) values ($1, 1)", mine)
    insert = f"""insert into public.segmentation_results (project_id, kind, source_image_url)
                 values ('{project}', 'segment_visual', 'uploads/{mine}/a.jpg')"""
    await as_user(sql, mine, insert)
    with pytest.raises(asyncpg.InsufficientPrivilegeError):
        await as_user(sql, theirs, insert)
    assert len(await as_user(sql, mine, "select id, status from public.segmentation_results")) == 1
    assert await as_user(sql, theirs, "select id, status from public.segmentation_results") == []
    await sql.close()


async def test_a_row_is_owned_and_checked_whatever_the_insert_says(database: Database) -> None:
    sql = await connected(database)
    user = await sql.fetchval("insert into auth.users default values returning id")
    project = await sql.fetchval("insert into public.projects (user_id) values ($1) returning id", user)
    row = await sql.fetchrow(
        """insert into public.segmentation_results (project_id, user_id, kind, source_image_url, attempts, claim_token, deaths)
           values ($1, gen_random_uuid(), 'segment_visual', $2, 9, gen_random_uuid(), 2) returning *""",
        project,
        f"uploads/{user}/a.jpg",
    )
    assert (row["user_id"], row["attempts"], row["claim_token"], row["deaths"]) == (user, 0, None, 0)
    with pytest.raises(asyncpg.RaiseError, match="user_id cannot be changed"):
        await sql.execute("update public.projects set user_id = gen_random_uuid() where id = $1", project)
    await sql.close()


async def test_params_beyond_64_kb_are_stored_as_an_error_without_them(database: Database) -> None:
    sql = await connected(database)
    user = await sql.fetchval("insert into auth.users default values returning id")
    project = await sql.fetchval("insert into public.projects (user_id) values ($1) returning id", user)
    row = await sql.fetchrow(
        """insert into public.segmentation_results (project_id, kind, source_image_url, params)
           values ($1, 'segment_visual', $2, $3) returning status, error, params""",
        project,
        f"uploads/{user}/a.jpg",
        json.dumps({"points": [[1, 2]] * 20000}),
    )
    assert (row["status"], json.loads(row["error"])["code"], row["params"]) == ("error", "params_invalid", "{}")
    await sql.close()


@pytest.mark.parametrize(
    ("table", "column", "kept", "needed"),
    [
        ("segmentation_results", "after", "bigint", "uuid"),
        ("segmentation_results", "claim_token", "text", "uuid"),
        ("segmentation_results", "params", "json", "jsonb"),
        ("segmentation_results", "attempts", "text", "integer"),
        ("segmentation_results", "kind", "public.task_status", "text"),
        ("segmentation_results", "fair_rank", "numeric", "double precision"),
        ("segmentation_results", "finished_at", "timestamp", "timestamptz"),
        ("usage_logs", "created_at", "date", "timestamptz"),
        ("users_profile", "created_at", "date", "timestamptz"),
        ("projects", "created_at", "date", "timestamptz"),
    ],
)
async def test_a_column_of_ours_that_is_there_with_another_type_is_named(
    empty_database: Database, table: str, column: str, kept: str, needed: str
) -> None:
    empty_database.execute(f"{plain_file().read_text()}{OLD_TABLES} alter table public.{table} add column {column} {kept};")
    with pytest.raises(ConfigurationError, match=rf"adopt.* public\.{table}\.{column} is .+ \({needed} is needed\); rename"):
        await apply(empty_database, plain=False)


@pytest.mark.parametrize(
    ("made", "named"),
    [
        ("create index open_ones on public.segmentation_results (id) where status = 'pending'", "index open_ones"),
        ("create view open_ones as select id from public.segmentation_results where status = 'pending'", "view open_ones"),
        ("create policy open_ones on public.segmentation_results using (status = 'done')", "policy open_ones"),
    ],
)
async def test_what_stands_on_an_enum_status_is_named_and_nothing_is_changed(
    empty_database: Database, made: str, named: str
) -> None:
    empty_database.execute(plain_file().read_text() + OLD_TABLES + made)
    with pytest.raises(ConfigurationError, match=rf"{named}.*; drop them first"):
        await apply(empty_database, plain=False)
    sql = await connected(empty_database)
    assert await sql.fetchval("select to_regnamespace('maskd')") is None
    await sql.close()


async def test_an_index_and_a_check_on_an_enum_status_are_no_obstacle(empty_database: Database) -> None:
    empty_database.execute(
        f"""{plain_file().read_text()}{OLD_TABLES}
        create index on public.segmentation_results (status);
        alter table public.segmentation_results add check (status <> 'error' or text_prompt <> '')"""
    )
    await apply(empty_database, plain=False)


async def test_a_column_that_must_be_filled_and_is_not_ours_is_named(empty_database: Database) -> None:
    empty_database.execute(
        f"""{plain_file().read_text()}{OLD_TABLES}
        alter table public.segmentation_results add column model text not null, add column team text not null default 'a',
          add column number bigint generated always as identity, add column started_at timestamptz not null"""
    )
    with pytest.raises(ConfigurationError, match=r": public\.segmentation_results\.model may not be null and has no default"):
        await apply(empty_database, plain=False)


async def test_old_policies_that_allow_everything_show_and_give_nobody_the_rows_of_another(empty_database: Database) -> None:
    tables = ("segmentation_results", "projects", "usage_logs", "users_profile")
    old = [
        f"alter table public.{table} enable row level security; drop policy if exists anything on public.{table};"
        f"create policy anything on public.{table} for all using (true) with check (true);"
        for table in tables
    ]
    empty_database.execute(plain_file().read_text() + OLD_TABLES + "".join(old))
    await apply(empty_database, plain=False)
    sql = await connected(empty_database)
    mine, theirs = [await sql.fetchval("insert into auth.users default values returning id::text") for _ in range(2)]
    project = await sql.fetchval("insert into public.projects (user_id) values ($1::text::uuid) returning id::text", mine)
    insert = f"""insert into public.segmentation_results (project_id, kind, source_image_url)
                 values ('{project}', 'segment_visual', 'uploads/{mine}/a.jpg')"""
    await sql.execute("insert into public.users_profile (id) values ($1::text::uuid)", mine)  # the insert writes the usage
    await as_user(sql, mine, insert)
    for table in tables:
        key = "id" if table == "users_profile" else "created_at"
        assert len(await as_user(sql, mine, f"select {key} from public.{table}")) == 1
        assert await as_user(sql, theirs, f"select {key} from public.{table}") == []
    for forged in (insert, f"insert into public.projects (user_id, name) values ('{mine}', 'x')"):
        with pytest.raises(asyncpg.InsufficientPrivilegeError, match="row-level security"):
            await as_user(sql, theirs, forged)
    for table in ("segmentation_results", "projects"):
        assert await as_user(sql, theirs, f"delete from public.{table} returning id") == []
    assert await as_user(sql, theirs, "update public.projects set name = 'x' returning id") == []
    assert len(await as_user(sql, mine, "delete from public.segmentation_results returning id")) == 1
    await sql.close()


async def test_old_grants_and_policies_given_back_to_anon_show_nothing(empty_database: Database) -> None:
    empty_database.execute(plain_file().read_text() + OLD_TABLES)
    await apply(empty_database, plain=False)
    sql = await connected(empty_database)
    user = await sql.fetchval("insert into auth.users default values returning id")
    project = await sql.fetchval("insert into public.projects (user_id) values ($1) returning id", user)
    await sql.execute("insert into public.segmentation_results (project_id) values ($1)", project)
    await sql.execute("grant select on public.segmentation_results to anon; set role anon")
    assert await sql.fetch("select id from public.segmentation_results") == []
    await sql.close()
