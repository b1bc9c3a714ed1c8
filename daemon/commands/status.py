"""`maskd status`: the queue at a glance, once."""

from __future__ import annotations

import json
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console
from rich.text import Text

from daemon.board import board, lonely, paused
from daemon.config import store_config
from daemon.progress import plain
from daemon.stores import build_store


def status(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Tasks by kind and status, rates, workers, last errors."""
    found = anyio.run(ask_status)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    show(found, Console())


def show(found: dict[str, Any], console: Console) -> None:
    """For a person, with a sentence for each kind that does not go on."""
    console.print(board(found, console.width), highlight=False)
    if not found["tasks"]:
        console.print("no active tasks")
    for kind in lonely(found):
        console.print(Text(f"no live worker serves {plain(kind)}", style="bold red"))
    for kind in paused(found):
        console.print(Text(f"{plain(kind)} is paused; it goes on with: maskd resume {plain(kind)}", style="magenta"))


async def ask_status() -> dict[str, Any]:
    """What the database says."""
    store = build_store(store_config())
    await store.open()
    try:
        return await store.status()
    finally:
        await store.close()
