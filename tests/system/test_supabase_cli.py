"""The real Supabase command line beside `maskd migrate`: both keep the same histories, and neither stands in the other's way."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from support.database import Database, run
from support.supabase_cli import SupabaseProject

from storage import export, schema
from storage.migrate import Plan, migrate
from storage.schema import migration_files, plain_file

pytestmark = pytest.mark.system

# What a new table or function in public was open to until 2026, and is open to since.
OLD_GRANTS = "".join(
    f"alter default privileges in schema public grant all on {things} to anon, authenticated, service_role;"
    for things in ("tables", "functions", "sequences")
)
NEW_GRANTS = "alter default privileges revoke execute on functions from public;"
NOTES = """
create table public.notes (id uuid primary key default gen_random_uuid(), user_id uuid not null);
alter table public.notes enable row level security;
create policy own on public.notes for select to authenticated using (user_id = (select auth.uid()));
"""
# A lint that the hosted advisors have and the CLI's lack.
OPEN_DEFINERS = """
select p.oid::regprocedure::text from pg_proc p
 where p.pronamespace = 'public'::regnamespace and p.prosecdef
   and (has_function_privilege('anon', p.oid, 'execute') or has_function_privilege('authenticated', p.oid, 'execute'))
"""
NOW = datetime(2027, 3, 1, 12, 0, 5)  # in UTC, as versions are


@pytest.fixture
def supabase(empty_database: Database, tmp_path: Path) -> SupabaseProject:
    """A new project: its database has what Supabase gives to all, its repository nothing."""
    project = SupabaseProject(tmp_path / "project", empty_database.dsn)
    empty_database.execute(plain_file().read_text())
    return project


@pytest.fixture
def older_project(supabase: SupabaseProject) -> SupabaseProject:
    """A project that has pushed migrations of its own, older and newer than ours."""
    supabase.add("20250101000000_notes.sql", NOTES)
    supabase.add("20270101000000_titles.sql", "alter table public.notes add column title text;")
    assert len(supabase.pushed()) == 2
    return supabase


def test_what_the_cli_has_pushed_maskd_finds_up_to_date(supabase: SupabaseProject, empty_database: Database) -> None:
    supabase.migrations.rmdir()
    supabase.migrations.symlink_to(schema.migrations_dir())
    with as_supabases_role(supabase, empty_database):
        assert supabase.pushed() == names(migration_files())
        assert migrated(supabase, plain=False).pending == ()
        assert supabase.both_sides() == [(version, version) for version in our_versions()]


def test_what_maskd_has_migrated_leaves_the_cli_nothing_to_push_and_can_be_fetched(supabase: SupabaseProject) -> None:
    migrated(supabase)
    supabase.fetch()
    known = plan(supabase)
    assert (known.new, known.changed, names(known.there)) == ((), (), names(migration_files()))
    assert supabase.both_sides() == [(version, version) for version in our_versions()]
    assert supabase.pushed() == []


def test_an_export_into_an_empty_project_keeps_the_versions_that_maskd_has_recorded(supabase: SupabaseProject) -> None:
    migrated(supabase)
    supabase.add("20270101000000_notes.sql", NOTES)
    assert "not found in local migrations directory" in supabase.push().said  # what the export is there for
    exported = exported_into(supabase)
    assert [one.version for one in exported.new] == our_versions()
    assert supabase.pushed() == ["20270101000000_notes.sql"]


def test_a_project_with_migrations_of_its_own_pushes_its_next_one_as_before(older_project: SupabaseProject) -> None:
    before = older_project.both_sides()
    assert migrated(older_project).foreign_history
    assert older_project.both_sides() == before
    older_project.add("20270102000000_more.sql", "alter table public.notes add column more text;")
    assert older_project.pushed() == ["20270102000000_more.sql"]


def test_exported_files_are_pushed_behind_the_projects_own_and_maskd_knows_them(older_project: SupabaseProject) -> None:
    exported = exported_into(older_project)
    versions = [one.version for one in exported.new]
    assert versions == sorted(versions)
    assert versions[0] > "20270101000000"
    assert versions[-1] == f"{NOW:%Y%m%d%H%M%S}"
    assert older_project.pushed() == [f"{one.version}_maskd_{one.ours.name[15:]}" for one in exported.new]
    assert migrated(older_project).pending == ()
    assert plan(older_project).new == ()
    assert plan(older_project).repeated == ()
    older_project.add("20270401000000_next.sql", "alter table public.notes add column next text;")
    assert older_project.pushed() == ["20270401000000_next.sql"]


def test_after_an_update_only_what_is_new_is_exported_and_pushed(
    older_project: SupabaseProject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    *earlier, last = migration_files()
    with monkeypatch.context() as shorter:
        shorter.setattr(schema, "migrations_dir", lambda: copied(earlier, tmp_path / "earlier"))
        exported_into(older_project)
        older_project.pushed()
        assert migrated(older_project).pending == ()
    older_project.add("20270401000000_between.sql", "alter table public.notes add column between_both text;")
    assert older_project.pushed() == ["20270401000000_between.sql"]
    exported = exported_into(older_project)
    assert [(one.ours.name, one.version) for one in exported.new] == [(last.name, "20270401000001")]
    assert older_project.pushed() == [exported.new[0].target.name]
    assert migrated(older_project).pending == ()


def test_what_maskd_has_migrated_already_is_named_may_be_marked_and_may_be_pushed_again(older_project: SupabaseProject) -> None:
    migrated(older_project)
    exported = exported_into(older_project)
    versions = list(exported.repeated)
    assert versions == [one.version for one in exported.new]
    older_project.mark_applied(versions[:4])
    assert plan(older_project).repeated == tuple(versions[4:])
    assert older_project.pushed() == [one.target.name for one in exported.new[4:]]
    assert migrated(older_project).pending == ()


@pytest.mark.parametrize("grants", [OLD_GRANTS, NEW_GRANTS], ids=["everything to everybody", "nothing to anybody"])
def test_supabases_advisors_have_no_warning_about_our_schema(
    supabase: SupabaseProject, empty_database: Database, grants: str
) -> None:
    empty_database.execute(grants)
    migrated(supabase)
    ran = supabase.advisors()
    assert (ran.code, ran.answer.get("results")) == (0, []), ran.said
    assert run(fetched(supabase.dsn, OPEN_DEFINERS)) == []


def test_the_advisors_would_have_seen_what_is_wrong(supabase: SupabaseProject, empty_database: Database) -> None:
    migrated(supabase)
    empty_database.execute(
        """create table public.open_to_all (id int primary key); grant select on public.open_to_all to anon;
        create function maskd.loose() returns integer language sql as 'select 1';
        create policy slow on public.projects for select to authenticated using (user_id = auth.uid());"""
    )
    ran = supabase.advisors()
    assert ran.code == 1
    assert {finding["name"] for finding in ran.answer["results"]} == {
        "rls_disabled_in_public",
        "function_search_path_mutable",
        "auth_rls_initplan",
        "multiple_permissive_policies",
    }


def migrated(project: SupabaseProject, *, plain: bool = True) -> Plan:
    """`maskd migrate` on the project's database."""
    return run(migrate(project.dsn, plain=plain, dry_run=False, said=lambda line: None))


@contextmanager
def as_supabases_role(project: SupabaseProject, database: Database) -> Iterator[None]:
    """As a project's owner connects to Supabase: a role that makes roles and owns the schema, and is no superuser."""
    role = f"role_of_{database.name}"
    database.execute(
        f"""create role {role} login createrole bypassrls password 'secret';
        grant anon, authenticated, service_role to {role};
        alter database {database.name} owner to {role}; alter schema public owner to {role};
        alter publication supabase_realtime owner to {role};
        grant usage on schema auth to {role}; grant all on all tables in schema auth to {role};"""
    )
    project.dsn = f"postgresql://{role}:secret@{project.dsn.rpartition('@')[2]}"
    try:
        yield
    finally:
        project.dsn = database.dsn
        database.execute(f"reassign owned by {role} to postgres; drop owned by {role}; drop role {role}")


async def fetched(dsn: str, query: str) -> list[Any]:
    connection = await asyncpg.connect(dsn)
    try:
        return await connection.fetch(query)
    finally:
        await connection.close()


def plan(project: SupabaseProject) -> export.Export:
    """What `maskd migrate --export` would do, knowing the database."""
    return export.plan_export(project.migrations, run(export.histories(project.dsn)), NOW)


def exported_into(project: SupabaseProject) -> export.Export:
    planned = plan(project)
    export.write(planned)
    return planned


def copied(files: Sequence[Path], folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def names(files: Sequence[Path]) -> list[str]:
    return [file.name for file in files]


def our_versions() -> list[str]:
    return [name[:14] for name in names(migration_files())]
