"""`maskd status`: the queue at a glance."""

from __future__ import annotations

import json
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console
from rich.table import Table

from daemon.config import store_config
from daemon.stores import build_store


def status(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Tasks by kind and status, workers, last errors."""
    found = anyio.run(_ask)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    console = Console()
    console.print(_tasks(found) if found["tasks"] else "no active tasks")
    console.print(_workers(found))
    lonely = {row["kind"] for row in found["tasks"]} & {kind["kind"] for kind in found["kinds"] if not kind["served"]}
    for kind in sorted(lonely):
        console.print(f"[bold red]no live worker serves {kind}[/]")
    for error in found["errors"]:
        console.print(f"[red]{error['code']}[/] {error['kind']} {error['id']}: {error['message']}", highlight=False)


async def _ask() -> dict[str, Any]:
    store = build_store(store_config())
    await store.open()
    try:
        return await store.status()
    finally:
        await store.close()


def _tasks(found: dict[str, Any]) -> Table:
    table = Table("kind", "status", "tasks", "oldest", title="active tasks", title_justify="left")
    for row in found["tasks"]:
        table.add_row(row["kind"], row["status"], str(row["count"]), f"{row['oldest_seconds']} s")
    return table


def _workers(found: dict[str, Any]) -> Table:
    table = Table("worker", "host", "kinds", "last beat", title="workers", title_justify="left")
    for worker in found["workers"]:
        beat = f"{worker['silent_seconds']} s ago" + ("" if worker["alive"] else "  [red]silent[/]")
        table.add_row(worker["id"][:8], worker["info"].get("host", ""), ", ".join(worker["kinds"]), beat)
    return table
