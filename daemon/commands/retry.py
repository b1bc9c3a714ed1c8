"""`maskd retry`: put failed tasks back into the queue, one or many."""

from __future__ import annotations

from typing import Annotated

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
    tell,
)
from daemon.progress import counted


def retry(
    ids: Annotated[list[str] | None, typer.Argument(help="Tasks to retry; all that meet the options when left out.")] = None,
    error: Annotated[str | None, typer.Option("--error", help="Only tasks that ended with this error code.")] = None,
    kind: Annotated[list[str] | None, typer.Option(help="Only tasks of this kind; repeat for more.")] = None,
    project: Annotated[str | None, typer.Option(help="Only tasks of this project.")] = None,
    limit: Annotated[int | None, typer.Option(help="At most so many, oldest first.", min=1)] = None,
    yes: Annotated[bool, Yes] = False,
    dry_run: Annotated[bool, DryRun] = False,
    as_json: Annotated[bool, AsJson] = False,
    batch: Annotated[int, Batch] = BATCH,
    ask_above: Annotated[int, AskAbove] = ASK_ABOVE,
) -> None:
    """Put failed tasks back; their attempts start anew, nothing is charged again."""
    if not (ids or error or kind or project):
        raise typer.BadParameter("name tasks, or say which by --error, --kind and --project")
    manner = Manner(yes, dry_run, as_json, batch, ask_above)
    wanted = {
        "ids": ids_of(ids),
        "code": error,
        "kinds": kind or None,
        "project": project_of(project),
        "failed": True,
    }
    found = anyio.run(count, wanted)
    matched = found["count"] = min(found["count"], limit or found["count"])
    if dry_run or not matched:
        words = f"{matched:,} would be put back" if matched else "0 put back: there is no such failed task"
        tell(manner, words, matched=matched, retried=0)
        return
    if not confirmed(f"Put {counted(matched, 'failed task')} back?", matched, manner):
        raise typer.Exit(1)
    sums = anyio.run(change, "retry_some", wanted, found, "putting back", manner)
    done, stopped = sums["retried"], bool(sums["interrupted"])
    words = f"stopped: {done:,} of {matched:,} put back; the same command goes on" if stopped else f"{done:,} put back"
    if done < matched and not stopped:
        words += f"; the other {matched - done:,} wait for a task that failed, or are of a kind that is gone"
    tell(manner, words, matched=matched, retried=done, interrupted=stopped)
    if stopped:
        raise typer.Exit(1)
