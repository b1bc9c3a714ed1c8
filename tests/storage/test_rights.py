"""Who may do what: every role at every table and function, whether the project granted everything by default or nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import asyncpg
import pytest
from support.database import Database
from support.people import Person, as_role, person

from storage.migrate import migrate
from storage.schema import plain_file

pytestmark = pytest.mark.anyio

# What Supabase did for every new table and function until 2026, and an adopted project that did more of it by hand.
OLD_DEFAULTS = """
alter default privileges in schema public grant all on tables to anon, authenticated, service_role;
alter default privileges in schema public grant all on functions to anon, authenticated, service_role;
alter default privileges in schema public grant all on sequences to anon, authenticated, service_role;
"""
NEW_DEFAULTS = """
alter default privileges in schema public revoke all on tables from anon, authenticated, service_role;
alter default privileges in schema public revoke all on functions from anon, authenticated, service_role;
"""
ADOPTED = (
    OLD_DEFAULTS
    + """
create type public.task_status as enum ('pending', 'processing', 'done', 'error');
create table public.users_profile (id uuid primary key references auth.users (id) on delete cascade, tier text, credits integer);
create table public.projects (id uuid primary key default gen_random_uuid(),
  user_id uuid not null references auth.users (id) on delete cascade);
create table public.segmentation_results (id uuid primary key default gen_random_uuid(),
  project_id uuid not null references public.projects (id) on delete cascade, source_image_url text not null,
  status public.task_status not null default 'pending', created_at timestamptz default now());
create table public.usage_logs (
  id bigint generated always as identity primary key, user_id uuid, action text, credits_used integer);
do $$ declare t text; begin
  foreach t in array array['users_profile', 'projects', 'segmentation_results', 'usage_logs'] loop
    execute format('alter table public.%I enable row level security', t);
    execute format('create policy anything on public.%I for all using (true) with check (true)', t);
  end loop;
end $$;
create schema supabase_migrations;
create table supabase_migrations.schema_migrations (version text primary key, statements text[], name text);
insert into supabase_migrations.schema_migrations (version) values ('20250101000000');
"""
)
PROJECTS = {"old defaults": OLD_DEFAULTS, "new defaults": NEW_DEFAULTS, "adopted": ADOPTED}
TABLES = ("users_profile", "projects", "segmentation_results", "usage_logs")
FORBIDDEN = "forbidden"

SEEN = "id, project_id, kind, status, error, charged, mask_image_url, labels, metadata, created_at"
STATEMENTS = {
    "read profile": "select id, tier, credits from public.users_profile where id = '{id}'",
    "read usage": "select action, credits_used from public.usage_logs where user_id = '{id}'",
    "read project": "select id, name from public.projects where id = '{project}'",
    "read task": f"select {SEEN} from public.segmentation_results where project_id = '{{project}}'",
    "read token": "select claim_token from public.segmentation_results where project_id = '{project}'",
    "read rank": "select fair_rank, worker_id from public.segmentation_results where project_id = '{project}'",
    "insert task": "insert into public.segmentation_results (project_id, source_image_url)"
    " values ('{project}', '{image}') returning id",
    "insert task that is done": "insert into public.segmentation_results (project_id, source_image_url, mask_image_url)"
    " values ('{project}', '{image}', 'x') returning id",
    "update task": "update public.segmentation_results set status = 'pending' where project_id = '{project}' returning id",
    "delete task": "delete from public.segmentation_results where project_id = '{project}' returning id",
    "truncate tasks": "truncate public.segmentation_results",
    "insert project": "insert into public.projects (user_id, name) values ('{id}', 'new') returning id",
    "rename project": "update public.projects set name = 'new' where id = '{project}' returning id",
    "give project away": "update public.projects set user_id = user_id where id = '{project}' returning id",
    "delete project": "delete from public.projects where id = '{project}' returning id",
    "insert profile": "insert into public.users_profile (id, credits) values (gen_random_uuid(), 9) returning id",
    "update profile": "update public.users_profile set credits = 99 where id = '{id}' returning id",
    "delete profile": "delete from public.users_profile where id = '{id}' returning id",
    "insert usage": "insert into public.usage_logs (user_id, action, credits_used) values ('{id}', 'x', -9) returning action",
    "update usage": "update public.usage_logs set credits_used = 0 where user_id = '{id}' returning action",
    "delete usage": "delete from public.usage_logs where user_id = '{id}' returning action",
    "read prices": "select * from maskd.prices",
    "set prices": "update maskd.prices set credits = 0 returning kind",
    "read workers": "select * from maskd.workers",
    "create": "select public.create_segmentation('{project}', source_image_url => '{image}')",
    "cancel": "select public.cancel_segmentation("
    "(select id from public.segmentation_results where project_id = '{project}' limit 1))",
}
# What each caller gets at rows of `owner`: a number of rows, a code, or that it is forbidden.
OWNER = {
    "read profile": 1, "read usage": 1, "read project": 1, "read task": 1, "insert task": 1, "delete task": 1,
    "insert project": 1, "rename project": 1, "delete project": 1, "create": 1, "cancel": 1,
}  # fmt: skip
OTHER = {
    "read profile": 0, "read usage": 0, "read project": 0, "read task": 0, "delete task": 0, "rename project": 0,
    "delete project": 0, "create": "PT404", "cancel": "PT404",
}  # fmt: skip
SERVICE = dict.fromkeys(STATEMENTS, 1) | {
    "truncate tasks": 0, "insert profile": "23503", "read workers": 0, "create": "PT401",
}  # fmt: skip
CALLERS: dict[str, dict[str, Any]] = {"anon": {}, "another user": OTHER, "the owner": OWNER, "service_role": SERVICE}
FOR_USERS = {"public.create_segmentation", "public.cancel_segmentation", "maskd.cancel_own"}


@dataclass(frozen=True, slots=True)
class Project:
    """A migrated database with an owner, a task of theirs, and another user."""

    sql: asyncpg.Connection[Any]
    owner: Person
    other: Person


@pytest.fixture(params=PROJECTS)
def project_database(request: pytest.FixtureRequest, empty_database: Database) -> Database:
    empty_database.execute(plain_file().read_text() + PROJECTS[request.param])
    return empty_database


@pytest.fixture
async def project(project_database: Database) -> AsyncIterator[Project]:
    await migrate(project_database.dsn, plain=False, dry_run=False, said=lambda _: None)
    sql = await project_database.connect()
    made = Project(sql, await person(sql, 9), await person(sql, 9))
    await as_owner(made, STATEMENTS["insert task"])
    yield made
    await sql.close()


def asked(project: Project, statement: str) -> str:
    owner = project.owner
    return statement.format(id=owner.id, project=owner.project, image=owner.image)


async def as_owner(project: Project, statement: str) -> None:
    claims = {"sub": project.owner.id, "role": "authenticated"}
    await as_role(project.sql, "authenticated", claims, asked(project, statement))


async def gets(project: Project, caller: str, statement: str) -> int | str:
    """What the caller gets; nothing of it stays."""
    role = caller if caller in ("anon", "service_role") else "authenticated"
    claims = {"role": role}
    if role == "authenticated":
        claims["sub"] = (project.owner if caller == "the owner" else project.other).id
    attempt = project.sql.transaction()
    await attempt.start()
    try:
        rows = await as_role(project.sql, role, claims, asked(project, statement))
        return min(len(rows), 1)
    except asyncpg.InsufficientPrivilegeError:
        return FORBIDDEN
    except asyncpg.PostgresError as error:
        return str(error.sqlstate)
    finally:
        await attempt.rollback()


async def test_the_matrix_of_tables(project: Project) -> None:
    seen = {caller: {what: await gets(project, caller, how) for what, how in STATEMENTS.items()} for caller in CALLERS}
    print(table(seen))
    for caller, expected in CALLERS.items():
        assert seen[caller] == {what: expected.get(what, FORBIDDEN) for what in STATEMENTS}, caller


async def test_the_matrix_of_functions(project: Project) -> None:
    rows = await project.sql.fetch(
        """select n.nspname || '.' || p.proname as name, r.role, has_function_privilege(r.role, p.oid, 'execute') as granted,
                  has_schema_privilege(r.role, n.oid, 'usage') and has_function_privilege(r.role, p.oid, 'execute') as may
             from pg_proc p join pg_namespace n on n.oid = p.pronamespace
            cross join unnest(array['anon', 'authenticated', 'service_role']) r (role)
            where n.nspname = 'maskd' or n.nspname = 'public' and p.proname ~ '^(maskd_|create_seg|cancel_seg)'"""
    )
    assert len({row["name"] for row in rows}) > 40
    assert [row["name"] for row in rows if row["role"] == "anon" and (row["may"] or row["granted"])] == []
    assert {row["name"] for row in rows if row["role"] == "authenticated" and row["granted"]} == FOR_USERS
    assert [row["name"] for row in rows if row["role"] == "service_role" and not row["may"]] == []


async def test_nothing_in_our_schema_is_granted_to_users_but_one_function(project: Project) -> None:
    granted = await project.sql.fetch(
        """select c.relname, r.role from pg_class c join pg_namespace n on n.oid = c.relnamespace
            cross join unnest(array['anon', 'authenticated']) r (role)
            where n.nspname = 'maskd' and c.relkind in ('r', 'v', 'S', 'm') and (
              case when c.relkind = 'S' then has_sequence_privilege(r.role, c.oid, 'usage, select, update')
                   else has_table_privilege(r.role, c.oid, 'select, insert, update, delete, truncate, references') end)"""
    )
    assert [tuple(row) for row in granted] == []
    assert not await project.sql.fetchval("select has_schema_privilege('anon', 'maskd', 'usage')")


async def test_a_forged_insert_is_set_right(project: Project) -> None:
    """What a user may name is still checked: the owner comes from the project, the status from us."""
    claims = {"sub": project.owner.id, "role": "authenticated"}
    (row,) = await as_role(
        project.sql,
        "authenticated",
        claims,
        "insert into public.segmentation_results (project_id, source_image_url, status, params) values "
        f"('{project.owner.project}', 'uploads/{project.other.id}/a.jpg', 'done', '{{}}') returning status, error, charged",
    )
    assert (row["status"], json.loads(row["error"])["code"], row["charged"]) == ("error", "image_url_forbidden", 0)


async def test_no_function_of_ours_looks_among_temporary_types_first(database: Database) -> None:
    sql = await database.connect()
    try:
        astray = await sql.fetch(
            """select p.oid::regprocedure::text from pg_proc p join pg_namespace n on n.oid = p.pronamespace
                where (n.nspname = 'maskd' or n.nspname = 'public' and p.proname ~ '^(maskd_|create_segm|cancel_segm)')
                  and not coalesce(p.proconfig @> array['search_path=pg_catalog, pg_temp'], false)"""
        )
    finally:
        await sql.close()
    assert astray == []


def table(seen: dict[str, dict[str, int | str]]) -> str:
    """The matrix for a person: `pytest -s` prints it."""
    words = {0: "no rows", 1: "yes", FORBIDDEN: "-"}
    head = f"{'':26}" + "".join(f"{caller:15}" for caller in seen)
    return "\n".join(
        ["", head]
        + [f"{what:26}" + "".join(f"{words.get(row[what], row[what])!s:15}" for row in seen.values()) for what in STATEMENTS]
    )
