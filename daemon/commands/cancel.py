"""`maskd cancel`: end tasks that are not over yet, one or many."""

from __future__ import annotations

from typing import Annotated, Any

import anyio
import typer

from daemon.bulk import (
    ASK_ABOVE,
    BATCH,
    AsJson,
    AskAbove,
    Batch,
    DryRun,
    Manner,
    Yes,
    change,
    confirmed,
    count,
    ids_of,
    project_of,
    seconds_of,
    tell,
)
from daemon.progress import counted


def cancel(
    ids: Annotated[list[str] | None, typer.Argument(help="Tasks to cancel.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Tasks of this kind; repeat for more.")] = None,
    project: Annotated[str | None, typer.Option(help="Tasks of this project.")] = None,
    older_than: Annotated[str | None, typer.Option(help="Tasks inserted longer ago than that: 90s, 30m, 2h, 7d.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="All tasks that are not over.")] = False,
    yes: Annotated[bool, Yes] = False,
    dry_run: Annotated[bool, DryRun] = False,
    as_json: Annotated[bool, AsJson] = False,
    batch: Annotated[int, Batch] = BATCH,
    ask_above: Annotated[int, AskAbove] = ASK_ABOVE,
) -> None:
    """Cancel tasks that wait or run: those named, or all that meet every option. What had not begun is refunded."""
    filters = bool(kind or project or older_than)
    if bool(ids) + filters + everything != 1:
        raise typer.BadParameter("name tasks, or say which by --kind, --project and --older-than, or --all")
    wanted = {
        "ids": ids_of(ids),
        "kinds": kind or None,
        "project": project_of(project),
        "older_seconds": None if older_than is None else seconds_of(older_than),
        "newest_first": True,  # what waits for another task before that one, which would fail it
    }
    run(wanted, Manner(yes, dry_run, as_json, batch, ask_above))


def run(wanted: dict[str, Any], manner: Manner) -> None:
    """Count, ask, cancel, say what came of it."""
    found = anyio.run(count, wanted)
    matched = found["count"]
    if manner.dry_run or not matched:
        tell(
            manner,
            f"{counted(matched, 'task')} would be canceled" if matched else "nothing to cancel",
            matched=matched,
            canceled=0,
        )
        return
    if not confirmed(f"Cancel {counted(matched, 'task')}?", matched, manner):
        raise typer.Exit(1)
    sums = anyio.run(change, "cancel", wanted, found, "canceling", manner)
    done = sums["canceled"]
    words = f"{done:,} of {matched:,} canceled"
    words += f", {sums['running']:,} of them running" if sums["running"] else ""
    words += f", {sums['refunded']:,} credits given back" if sums["refunded"] else ""
    if sums["interrupted"]:
        words = f"stopped: {words}; the same command goes on"
    elif done < matched:
        words += f"; the other {matched - done:,} ended by themselves"
    facts = {"matched": matched, "canceled": done, "running": sums["running"], "refunded": sums["refunded"]}
    tell(manner, words, **facts, interrupted=bool(sums["interrupted"]))
    if sums["interrupted"]:
        raise typer.Exit(1)
