"""The SQL files are found, in order, and carry names that both migration tools understand."""

from __future__ import annotations

from pathlib import Path

import pytest

from storage import schema


def test_migrations_come_oldest_first_and_no_version_twice() -> None:
    versions = [file.name[:14] for file in schema.migration_files()]
    assert versions == sorted(set(versions))
    assert versions, "a checkout holds migrations"


def test_the_plain_shim_is_where_it_is_looked_for() -> None:
    assert schema.plain_file().is_file()


def test_a_file_with_another_name_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "1_short.sql").touch()
    monkeypatch.setattr(schema, "migrations_dir", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"1_short\.sql is not a migration's name"):
        schema.migration_files()
