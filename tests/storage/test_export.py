"""Our migrations as files of a project: under versions that sort behind its own, and without touching what is there."""

from __future__ import annotations

import os
from datetime import datetime
from pathlib import Path

import pytest
from support.database import Database

from daemon.commands.migrate import migrate as command
from daemon.stores import place_of
from storage import schema
from storage.base import ConfigurationError
from storage.export import NO_HISTORIES, Export, Histories, check_folder, plan_export, write
from storage.schema import migration_files

NOW = datetime(2027, 3, 1, 12, 0, 5)  # in UTC, as versions are


class Shell:
    """`maskd migrate`, called as a function: the lines that it says."""

    def __init__(self, patch: pytest.MonkeyPatch, printed: pytest.CaptureFixture[str]) -> None:
        self.url = ""
        self._patch = patch
        self._printed = printed

    def __call__(self, *, plain: bool = False, dry_run: bool = False, export: Path | None = None) -> list[str]:
        self._patch.setenv("DATABASE_URL", self.url)
        command(plain=plain, dry_run=dry_run, export=export)
        return self._printed.readouterr().out.splitlines()


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Shell:
    monkeypatch.chdir(tmp_path)  # where no .env names a database
    return Shell(monkeypatch, capsys)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "supabase" / "migrations"
    made.mkdir(parents=True)
    return made


@pytest.fixture
def three(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Three migrations instead of all of ours, and their versions."""
    ours = tmp_path / "ours"
    ours.mkdir()
    for version, name in (("20261121000000", "one"), ("20261121000100", "two"), ("20261121000200", "three")):
        (ours / f"{version}_{name}.sql").write_text(
            f"select 1;\n\ninsert into maskd.migrations (version, name) values ('{version}', '{name}') on conflict do nothing;\n"
        )
    monkeypatch.setattr(schema, "migrations_dir", lambda: ours)
    return [file.name[:14] for file in migration_files()]


def versions(folder: Path, known: Histories = NO_HISTORIES) -> list[str]:
    return [one.version for one in plan_export(folder, known, NOW).new]


def test_every_migration_records_its_own_version_by_which_its_copies_are_known(folder: Path) -> None:
    write(plan_export(folder, NO_HISTORIES, NOW))
    again = plan_export(folder, NO_HISTORIES, NOW)
    assert (again.new, again.changed, len(again.there)) == ((), (), len(migration_files()))
    assert sorted(file.read_bytes() for file in folder.iterdir()) == sorted(file.read_bytes() for file in migration_files())


@pytest.mark.parametrize(
    ("newest", "expected"),
    [
        ("20250101000000", ["20261121000000", "20261121000100", "20261121000200"]),
        ("20261121000050", ["20270301120003", "20270301120004", "20270301120005"]),
        ("20271231235958", ["20271231235959", "20280101000000", "20280101000001"]),
        ("0098", ["20261121000000", "20261121000100", "20261121000200"]),
        ("3", ["4", "5", "6"]),
        ("4098", ["4099", "4100", "4101"]),
        ("20269999000000", ["20269999000001", "20269999000002", "20269999000003"]),
    ],
)
def test_ours_keep_their_versions_unless_the_project_has_newer_ones(
    folder: Path, three: list[str], newest: str, expected: list[str]
) -> None:
    (folder / f"{newest}_theirs.sql").touch()
    (folder / "0001_first.sql").touch()
    assert versions(folder) == expected
    assert [newest, *expected] == sorted([newest, *expected])  # as the CLI compares them


def test_numbers_of_a_project_that_counts_are_continued(folder: Path, three: list[str]) -> None:
    (folder / "99999999999998_theirs.sql").touch()
    with pytest.raises(ConfigurationError, match="no version sorts behind 99999999999999"):
        versions(folder)
    (folder / "99991231235959_last.sql").touch()
    (folder / "99999999999998_theirs.sql").unlink()
    with pytest.raises(ConfigurationError, match="no version sorts behind 99991231235959"):
        versions(folder)


def test_versions_of_the_database_count_like_those_of_the_folder(folder: Path, three: list[str]) -> None:
    known = Histories({"20270401000000": "theirs", three[0]: "one"}, frozenset(three[:2]))
    plan = plan_export(folder, known, NOW)
    assert [one.version for one in plan.new] == [three[0], "20270401000001", "20270401000002"]
    assert plan.astray == ("20270401000000",)
    assert plan.repeated == ("20270401000001",)


def test_another_migration_under_a_version_of_ours_is_not_taken_for_ours(folder: Path, three: list[str]) -> None:
    (folder / f"{three[2]}_theirs.sql").write_text("select 2;")
    assert versions(folder, Histories({three[2]: "theirs"}, frozenset())) == [f"2027030112000{second}" for second in (3, 4, 5)]


def test_a_file_that_was_renamed_or_has_other_line_endings_is_still_ours(folder: Path, three: list[str]) -> None:
    write(plan_export(folder, NO_HISTORIES, NOW))
    first, second, _ = sorted(folder.iterdir())
    second.write_bytes(second.read_bytes().replace(b"\n", b"\r\n"))
    first.rename(folder / "20260101000000_queue.sql")
    again = plan_export(folder, NO_HISTORIES, NOW)
    assert (again.new, again.changed, len(again.there)) == ((), (), 3)


def test_a_file_that_was_changed_is_named_and_left_alone(folder: Path, three: list[str]) -> None:
    first, *_ = [one.target for one in exported(folder).new]
    first.write_text(first.read_text().replace("select 1", "select 2"))
    emptied = folder / f"{three[1]}_maskd_two.sql"
    emptied.write_text(";")
    again = exported(folder)
    assert (again.new, again.changed) == ((), (first, emptied))
    assert (first.read_text()[:9], emptied.read_text()) == ("select 2;", ";")


def test_files_that_the_project_has_put_into_one_are_not_written_again(folder: Path, three: list[str]) -> None:
    together = folder / "20260101000000_all.sql"
    together.write_text("\n".join(file.read_text() for file in migration_files()[:2]))
    plan = plan_export(folder, NO_HISTORIES, NOW)
    assert ([one.own for one in plan.new], plan.changed) == (three[2:], (together,))


def test_nothing_is_written_over_and_no_half_file_is_left(folder: Path, three: list[str]) -> None:
    plan = plan_export(folder, NO_HISTORIES, NOW)
    plan.new[1].target.write_text("came up meanwhile")
    with pytest.raises(ConfigurationError, match=r"cannot write .*maskd_two\.sql"):
        write(plan)
    assert sorted(file.name for file in folder.iterdir()) == [f"{three[0]}_maskd_one.sql", f"{three[1]}_maskd_two.sql"]
    assert plan.new[1].target.read_text() == "came up meanwhile"


def test_what_is_no_plain_file_is_neither_read_nor_written_through(folder: Path, three: list[str], tmp_path: Path) -> None:
    (folder / "20250101000000_nowhere.sql").symlink_to(tmp_path / "nowhere")
    (folder / "20250101000001_itself.sql").symlink_to("20250101000001_itself.sql")
    (folder / "20250101000002_folder.sql").mkdir()
    os.mkfifo(folder / "20250101000003_pipe.sql")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text("mine")
    (folder / f"{three[0]}_maskd_one.part").symlink_to(elsewhere)
    write(plan_export(folder, NO_HISTORIES, NOW))
    assert versions(folder) == []
    assert elsewhere.read_text() == "mine"


def test_a_folder_that_cannot_be_the_one_is_refused_with_the_one_that_was_meant(folder: Path, tmp_path: Path) -> None:
    for wrong, said in (
        (tmp_path, f"name {folder}"),
        (folder.parent, f"name {folder}"),
        (tmp_path / "nowhere" / "migrations", f"there is no folder {tmp_path / 'nowhere'}"),
        (Path(__file__), "is not a folder"),
    ):
        with pytest.raises(ConfigurationError, match=said):
            check_folder(wrong)


def test_the_command_needs_no_database_and_a_dry_run_writes_nothing(shell: Shell, tmp_path: Path) -> None:
    project = tmp_path / "project" / "supabase"
    project.mkdir(parents=True)
    folder, count = project / "migrations", len(migration_files())
    assert [line.split()[:2] for line in shell(export=folder, dry_run=True)] == [["would", "write"]] * count
    assert list(project.iterdir()) == []
    said = shell(export=folder)
    assert len(list(folder.glob("*.sql"))) == count
    assert said[-2:] == [f"{count} new files in {folder}", "next: supabase db push"]
    assert shell(export=folder) == [f"{folder} has all migrations of maskd"]
    with pytest.raises(ConfigurationError, match="one of them"):
        shell(export=folder, plain=True)


def test_the_command_says_which_database_and_shows_no_password(shell: Shell, empty_database: Database, tmp_path: Path) -> None:
    shell.url = empty_database.dsn
    place = f"database {empty_database.host}:{empty_database.port}/{empty_database.name}"
    count = len(migration_files())
    migrated = shell(plain=True)
    assert (migrated[0], migrated[-1]) == (place, f"up to date ({count} migrations, {count} of them new)")
    assert shell() == shell(dry_run=True) == [place, f"up to date ({count} migrations, none of them new)"]
    exporting = shell(export=tmp_path / "migrations")
    assert (exporting[0], exporting[-1]) == (f"{place} (only read)", "next: supabase db push")
    password = shell.url.partition("@")[0].rpartition(":")[2]
    assert password not in "\n".join([*migrated, *exporting])


def test_a_database_is_named_without_its_user() -> None:
    assert place_of("postgresql://me:secret@[::1]:6543/queue?sslmode=require") == "[::1]:6543/queue"
    assert place_of("postgresql://me:secret@/?host=/run/pg&port=5433") == "/run/pg:5433/postgres"


def exported(folder: Path) -> Export:
    plan = plan_export(folder, NO_HISTORIES, NOW)
    write(plan)
    return plan
