"""Where the SQL files are: the migrations in order, and the shim that gives a plain Postgres what Supabase has.

Finds them in a checkout and in an installed wheel, which carries `migrations/` inside this package. Never runs them.
"""

from __future__ import annotations

import re
from pathlib import Path

FILE_NAME = re.compile(r"^([0-9]{14})_([a-z0-9_]+)\.sql$")


def migrations_dir() -> Path:
    """The folder of the migrations: `storage/migrations` when installed, else `migrations` beside the packages."""
    package = Path(__file__).resolve().parent
    installed = package / "migrations"
    return installed if installed.is_dir() else package.parent / "migrations"


def migration_files() -> list[Path]:
    """The migrations, oldest first; ValueError for a .sql file that is not named `<14 digits>_<name>.sql`."""
    files = sorted(migrations_dir().glob("*.sql"))
    for file in files:
        if FILE_NAME.match(file.name) is None:
            raise ValueError(f"{file.name} is not a migration's name: it must be <14 digits>_<name>.sql")
    return files


def plain_file() -> Path:
    """The shim for a Postgres that is not Supabase's: run it before the migrations."""
    return Path(__file__).resolve().parent / "plain.sql"
