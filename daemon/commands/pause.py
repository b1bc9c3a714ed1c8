"""`maskd pause` and `maskd resume`: kinds that nobody claims for a while, and that go on at once afterwards."""

from __future__ import annotations

import json
from typing import Annotated, Any

import anyio
import typer

from daemon.bulk import AsJson, opened


def pause(
    kinds: Annotated[list[str], typer.Argument(help="Kinds to hold back.")],
    as_json: Annotated[bool, AsJson] = False,
) -> None:
    """Hold kinds back: their tasks wait, and none of them ends for that. What runs already is finished."""
    _tell(anyio.run(_set, kinds, True), "paused", as_json)


def resume(
    kinds: Annotated[list[str] | None, typer.Argument(help="Kinds that go on; all that are paused when left out.")] = None,
    as_json: Annotated[bool, AsJson] = False,
) -> None:
    """Let paused kinds go on, at once."""
    _tell(anyio.run(_set, kinds or [], False), "resumed", as_json)


async def _set(kinds: list[str], stop: bool) -> dict[str, Any]:
    async with opened() as store:
        answer: dict[str, Any] = await store.ask("pause", names=kinds, stop=stop)
    if answer["unknown"]:
        raise typer.BadParameter(f"there is no kind {answer['unknown'][0]}; there are: {', '.join(answer['known'])}")
    return answer


def _tell(answer: dict[str, Any], done: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"changed": answer["changed"], "paused": answer["paused"]}))
        return
    typer.echo(f"{done}: {', '.join(answer['changed']) or 'nothing new'}")
    if answer["paused"]:
        typer.echo(f"paused now: {', '.join(answer['paused'])}")
