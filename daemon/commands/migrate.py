"""`maskd migrate`: bring the database's schema up to date."""

from __future__ import annotations

from typing import Annotated

import anyio
import typer

from daemon.config import database_url
from storage import migrate as migrations


def migrate(
    plain: Annotated[bool, typer.Option("--plain", help="First give a plain Postgres what Supabase has.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be done, change nothing.")] = False,
) -> None:
    """Apply the migrations that the database lacks."""

    async def go() -> migrations.Plan:
        return await migrations.migrate(database_url(), plain=plain, dry_run=dry_run, said=typer.echo)

    plan = anyio.run(go)
    if dry_run:
        for file in plan.pending:
            typer.echo(f"would apply {file.name}")
        if plan.lacks_supabase and not plain:
            typer.echo("this database lacks what Supabase has: run with --plain if it is a plain Postgres")
    elif not plan.pending:
        typer.echo(f"up to date ({len(plan.applied)} migrations)")
