"""Writes our migrations as files into a project's own `supabase/migrations`, where `supabase db push` accepts them.

Enters: that folder and, where a database is known, what its histories hold. Leaves: new files, each sorted behind all that the
project has. Never changes, replaces or removes a file, and runs no SQL of ours: every file records its own version when it runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import asyncpg

from storage.base import ConfigurationError
from storage.postgres import translate
from storage.schema import migration_files
from storage.way import BY_DSN, Way, connect

PROJECT_FILE = re.compile(r"^([0-9]+)_(.*)\.sql$")  # what the Supabase CLI takes for a migration
RECORDS = re.compile(r"insert into maskd\.migrations \(version, name\) values \('([0-9]{14})'")
READ_BYTES_MAX = 1 << 20  # ours have some twenty thousand; a larger file of the project is none of them
STAMP = "%Y%m%d%H%M%S"
STAMP_DIGITS = 14


@dataclass(frozen=True, slots=True)
class Histories:
    """What a database has run: by Supabase's history (name by version) and by ours (versions)."""

    supabase: Mapping[str, str]
    maskd: frozenset[str]


@dataclass(frozen=True, slots=True)
class New:
    """A migration of ours that the folder lacks, its own version, and the version and file that it gets there."""

    ours: Path
    own: str
    version: str
    target: Path


@dataclass(frozen=True, slots=True)
class Export:
    """What an export writes and what it leaves alone."""

    new: tuple[New, ...]
    there: tuple[Path, ...]  # as we would have written them
    changed: tuple[Path, ...]  # ours by what they record, yet another text
    astray: tuple[str, ...]  # versions that the database has run and the folder lacks, which `supabase db push` refuses
    repeated: tuple[str, ...]  # versions that `supabase db push` would run though `maskd migrate` has done so already


NO_HISTORIES = Histories({}, frozenset())


async def histories(dsn: str, way: Way = BY_DSN) -> Histories:
    """Read both histories; empty where there is none. Raises UnavailableError or ConfigurationError."""
    try:
        connection = await connect(dsn, way, "maskd migrate", 10, command_seconds=10)
    except Exception as error:
        raise translate(error) from error
    try:
        supabase: dict[str, str] = {}
        if await connection.fetchval("select to_regclass('supabase_migrations.schema_migrations') is not null"):
            query = "select version, to_jsonb(m) ->> 'name' from supabase_migrations.schema_migrations m"  # old ones lack names
            supabase = {version: name or "" for version, name in await connection.fetch(query)}
        maskd: frozenset[str] = frozenset()
        if await connection.fetchval("select to_regclass('maskd.migrations') is not null"):
            maskd = frozenset(row[0] for row in await connection.fetch("select version from maskd.migrations"))
        return Histories(supabase, maskd)
    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError, TimeoutError) as error:
        raise translate(error) from error
    finally:
        connection.terminate()


def check_folder(folder: Path) -> None:
    """Refuse what cannot be a project's folder of migrations, naming the one that was meant where it can be seen."""
    for inner in (folder / "supabase" / "migrations", folder / "migrations"):
        if inner.is_dir():
            raise ConfigurationError(f"{folder} is not the folder of migrations itself; name {inner}")
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"{folder} is not a folder; name the project's supabase/migrations")
    if not folder.parent.is_dir():
        raise ConfigurationError(f"there is no folder {folder.parent}; name the project's supabase/migrations")


def plan_export(folder: Path, known: Histories, now: datetime) -> Export:
    """Decide what to write into `folder`. Ours keep their versions where those sort behind all that the project has (or where the
    database knows them by Supabase's history); else they get newer ones, the last of them `now` if nothing is newer still.
    """
    files = _project_files(folder)
    project = {file.name.partition("_")[0]: file for file in files}
    recorded = {version: file for file in files for version in RECORDS.findall(_text(file))}
    ours = {file.name[:STAMP_DIGITS]: file for file in migration_files()}
    pushed = {version for version, file in ours.items() if known.supabase.get(version) in _names(file)}
    for version, file in ours.items():
        if version in project and PROJECT_FILE.sub(r"\2", project[version].name) in _names(file):
            recorded.setdefault(version, project[version])  # emptied by hand, or by a history without statements
    lacking = [version for version in ours if version not in recorded]
    newest = max([*project, *(known.supabase.keys() - pushed)], default="")
    new: list[New] = []
    for place, own in enumerate(lacking, start=1):
        version = own if own in pushed or own > newest else _behind(newest, now - timedelta(seconds=len(lacking) - place))
        new.append(New(ours[own], own, version, folder / f"{version}_{_names(ours[own])[0]}.sql"))
        newest = max(newest, version)
    held = {version: file for version, file in sorted(recorded.items()) if version in ours}
    versions = {own: file.name.partition("_")[0] for own, file in held.items()} | {one.own: one.version for one in new}
    same = {version for version, file in held.items() if _plain(_text(file)) == _plain(_text(ours[version]))}
    return Export(
        tuple(new),
        tuple(file for version, file in held.items() if version in same),
        tuple(dict.fromkeys(file for version, file in held.items() if version not in same)),
        tuple(sorted(known.supabase.keys() - project.keys() - set(versions.values()))),
        tuple(sorted({version for own, version in versions.items() if own in known.maskd and version not in known.supabase})),
    )


def write(export: Export) -> None:
    """Write what the plan says, each file whole or not at all. Raises ConfigurationError when the folder does not let us."""
    for one in export.new:
        part = one.target.with_suffix(".part")  # no migration yet, should we be killed now
        try:
            one.target.parent.mkdir(exist_ok=True)
            if one.target.exists():
                raise FileExistsError(f"{one.target} has come up meanwhile")
            part.unlink(missing_ok=True)  # what an export that was killed left, or a link to elsewhere
            part.write_bytes(one.ours.read_bytes())
            part.rename(one.target)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise ConfigurationError(f"cannot write {one.target}: {error}") from error


def _behind(newest: str, moment: datetime) -> str:
    """A version that sorts behind `newest`, as texts, which is how the CLI compares: a time, or the next number where the project
    counts instead.
    """
    stamp = _stamp(newest)
    if newest and stamp is None:
        counted = str(int(newest) + 1).zfill(len(newest))
        if counted > newest:
            return counted
    elif stamp is None or stamp < datetime.max - timedelta(seconds=1):
        later = moment if stamp is None else max(moment, stamp + timedelta(seconds=1))
        return later.strftime(STAMP)
    raise ConfigurationError(
        f"no version sorts behind {newest}, the newest of the project's migrations; give that one a smaller version"
    )


def _stamp(version: str) -> datetime | None:
    if len(version) != STAMP_DIGITS:
        return None
    try:
        return datetime.strptime(version, STAMP)
    except ValueError:
        return None


def _project_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.glob("*.sql") if PROJECT_FILE.match(file.name)) if folder.is_dir() else []


def _names(ours: Path) -> tuple[str, str]:
    """Ours as it is called in a project's folder, and in our own."""
    name = ours.stem[STAMP_DIGITS + 1 :]
    return f"maskd_{name}", name


def _text(file: Path) -> str:
    """What a file holds; nothing, when it is none of ours by its size, or is no plain file: a pipe would never end."""
    try:
        ours_perhaps = file.is_file() and file.stat().st_size <= READ_BYTES_MAX
        return file.read_text(encoding="utf-8", errors="replace") if ours_perhaps else ""
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a ring, before Python 3.13
        raise ConfigurationError(f"cannot read {file}: {error}") from error


def _plain(text: str) -> str:
    """Without what line endings, and the CLI's way of splitting and joining statements, change."""
    return " ".join(text.split()).rstrip("; ")
