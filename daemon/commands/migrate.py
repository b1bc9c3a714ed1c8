"""`maskd migrate`: bring the database's schema up to date, or give its migrations to a project that pushes its own."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import anyio
import typer

from daemon.config import database_config, has_database_url
from daemon.progress import counted
from daemon.stores import place_of, way_of
from storage import export as exports
from storage import migrate as migrations
from storage.base import ConfigurationError

ASTRAY_SHOWN = 5


def migrate(
    plain: Annotated[bool, typer.Option("--plain", help="First give a plain Postgres what Supabase has.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, change nothing.")] = False,
    export: Annotated[
        Path | None,
        typer.Option(
            "--export", metavar="DIR", help="Write the migrations as files into a project's supabase/migrations instead."
        ),
    ] = None,
) -> None:
    """Apply the migrations that the database lacks."""
    if export is None:
        _migrate(plain, dry_run)
    elif plain:
        raise ConfigurationError("--plain changes a database and --export writes files: give one of them")
    else:
        _export(export, dry_run)


def _migrate(plain: bool, dry_run: bool) -> None:
    config = database_config()
    url = config.database_dsn()
    typer.echo(f"database {place_of(url)}")

    async def go() -> migrations.Plan:
        return await migrations.migrate(url, plain=plain, dry_run=dry_run, said=typer.echo, way=way_of(config))

    plan = anyio.run(go)
    count = len(plan.applied) + len(plan.pending)
    if not dry_run:
        typer.echo(f"up to date ({counted(count, 'migration')}, {len(plan.pending) or 'none'} of them new)")
        if plan.foreign_history and plan.pending:
            typer.echo("to have them in that project's repository, too: maskd migrate --export supabase/migrations")
        return
    for file in plan.pending:
        typer.echo(f"would apply {file.name}")
    if plan.lacks_supabase and not plain:
        typer.echo("this database lacks what Supabase has: run with --plain if it is a plain Postgres")
    elif not plan.pending:
        typer.echo(f"up to date ({counted(count, 'migration')}, none of them new)")


def _export(folder: Path, dry_run: bool) -> None:
    exports.check_folder(folder)
    known = exports.NO_HISTORIES
    if has_database_url():
        config = database_config()
        typer.echo(f"database {place_of(config.database_dsn())} (only read)")
        known = anyio.run(exports.histories, config.database_dsn(), way_of(config))
    plan = exports.plan_export(folder, known, datetime.now(UTC).replace(tzinfo=None))
    if not dry_run:
        exports.write(plan)
    for one in plan.new:
        own = "" if one.version == one.own else f" (maskd's {one.ours.name})"
        typer.echo(f"{'would write' if dry_run else 'wrote'} {one.target.name}{own}")
    for file in plan.changed:
        typer.echo(f"left {file.name} as it is: it is maskd's, with changes")
    if not plan.new:
        typer.echo(f"{folder} has all migrations of maskd")
    elif not dry_run:
        typer.echo(f"{counted(len(plan.new), 'new file')} in {folder}")
    for line in _hindrances(plan) or (["next: supabase db push"] if plan.new and not dry_run else []):
        typer.echo(line)


def _hindrances(plan: exports.Export) -> list[str]:
    """What the person should see to before `supabase db push`."""
    lines: list[str] = []
    if plan.astray:
        some = ", ".join(plan.astray[:ASTRAY_SHOWN]) + (", …" if len(plan.astray) > ASTRAY_SHOWN else "")
        lines += [
            f"the database has run what this folder lacks: {some}",
            "supabase db push refuses until it is there: is this the right folder, and up to date?",
        ]
    if plan.repeated:
        lines += [
            "maskd migrate has run these in the database; so that supabase db push does not run them once more:",
            f"  supabase migration repair --status applied {' '.join(plan.repeated)}",
        ]
    return lines
