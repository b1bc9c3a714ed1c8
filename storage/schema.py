"""Where the SQL files are: the migrations in order, and the shim that gives a plain Postgres what Supabase has.

Finds them in a checkout and in an installed wheel, which carries `migrations/` inside this package. Never runs them.
"""

from __future__ import annotations

import re
from pathlib import Path

FILE_NAME = re.compile(r"^([0-9]{14})_([a-z0-9_]+)\.sql$")
TABLES = ("users_profile", "projects", "usage_logs", "segmentation_results")
MADE = re.compile(
    r"\b(?P<verb>create|drop) (?:or replace )?(?:unique )?(?P<what>index|trigger|policy) (?:if (?:not )?exists )?(?P<name>\w+)"
    r"(?: on public\.(?P<table>\w+|%I))?"
)
"""A statement that makes or drops something by name; %I stands for each of the tables in turn."""


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


def declared() -> dict[str, dict[str, str]]:
    """What the migrations altogether make, by `index`, `trigger` and `policy`: names (of policies table.name), and the statement
    that makes each, in one line."""
    found: dict[str, dict[str, str]] = {"index": {}, "trigger": {}, "policy": {}}
    for file in migration_files():
        sql = file.read_text(encoding="utf-8")
        for made in MADE.finditer(sql):
            tables = TABLES if made["table"] == "%I" else (made["table"],)
            names = [f"{table}.{made['name']}" for table in tables] if made["what"] == "policy" else [made["name"]]
            statement = " ".join(sql[made.start() : sql.index(";", made.start())].split())
            for name in names:
                found[made["what"]].pop(name, None)
                if made["verb"] == "create":
                    found[made["what"]][name] = statement
    return found


def plain_file() -> Path:
    """The shim for a Postgres that is not Supabase's: run it before the migrations."""
    return Path(__file__).resolve().parent / "plain.sql"
