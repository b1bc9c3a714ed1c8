"""`maskd prune`: delete old tasks that are over, and the blobs that nobody needs any more."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console

from daemon.bulk import (
    ASK_ABOVE,
    BATCH,
    AsJson,
    AskAbove,
    Batch,
    DryRun,
    Manner,
    Stop,
    Yes,
    confirmed,
    interruptible,
    opened,
    patiently,
    seconds_of,
    tell,
)
from daemon.config import Config, load
from daemon.main import build_blobs
from daemon.progress import Rows, counted
from daemon.sweep import Sweeper
from storage.base import TaskStore, UnavailableError

NEVER = "never"
ENDED = ("done", "error", "canceled")


@dataclass(frozen=True, slots=True)
class Pruning:
    """What to do: what was found to be old, and whether blobs go too (with which settings), strays among them."""

    found: dict[str, Any]
    config: Config | None
    strays: bool
    manner: Manner


def prune(
    done_before: Annotated[str, typer.Option(help="Finished longer ago than that; never keeps them all.")] = "30d",
    errors_before: Annotated[str, typer.Option(help="The same of tasks in error.")] = "90d",
    canceled_before: Annotated[str, typer.Option(help="The same of canceled tasks.")] = "30d",
    blobs: Annotated[bool, typer.Option(help="Delete blobs that are due too; running daemons do, in their own time.")] = True,
    strays: Annotated[
        bool, typer.Option("--strays", help="Look under every task that is over for blobs of lost attempts.")
    ] = False,
    yes: Annotated[bool, Yes] = False,
    dry_run: Annotated[bool, DryRun] = False,
    as_json: Annotated[bool, AsJson] = False,
    batch: Annotated[int, Batch] = BATCH,
    ask_above: Annotated[int, AskAbove] = ASK_ABOVE,
) -> None:
    """Delete old tasks that are over, with their blobs. What a task that is not over still names stays."""
    manner = Manner(yes, dry_run, as_json, batch, ask_above)
    asked = dict(zip(ENDED, (done_before, errors_before, canceled_before), strict=True))
    kept = {ended: None if span == NEVER else seconds_of(span) for ended, span in asked.items()}
    config = load() if blobs or strays else None
    found = anyio.run(_prunable, kept)
    counts = {ended: found[ended]["count"] for ended in found}
    total = sum(counts.values())
    words = ", ".join(f"{number:,} {ended}" for ended, number in counts.items())
    if dry_run:
        tell(manner, f"{counted(total, 'old task')} would be deleted ({words or 'none'})", matched=total, **counts)
        return
    if not confirmed(f"Delete {counted(total, 'old task')} ({words}) for good?", total, manner):
        raise typer.Exit(1)
    sums = anyio.run(_prune, Pruning(found, config, strays, manner))
    stopped = bool(sums["interrupted"])
    words = f"{sums['deleted']:,} of {counted(total, 'old task')} deleted"
    words += f", {sums['kept']:,} kept, which live tasks name" if sums["kept"] else ""
    words += f"; {sums['blobs']:,} blobs deleted" if config is not None else ""
    words += f"; {sums['workers']:,} lost workers forgotten" if sums["workers"] else ""
    facts = {name: sums[name] for name in ("deleted", "kept", "blobs", "workers", "tombstones")}
    tell(manner, f"stopped: {words}; the same command goes on" if stopped else words, matched=total, **facts, interrupted=stopped)
    if stopped:
        raise typer.Exit(1)


async def _prunable(kept: dict[str, float | None]) -> dict[str, Any]:
    async with opened() as store:
        found: dict[str, Any] = await store.ask("prunable", kept=kept)
        return found


async def _prune(pruning: Pruning) -> Counter[str]:
    """Rows first, then what else grows, then blobs."""
    sums: Counter[str] = Counter()
    async with opened() as store:
        total = sum(old["count"] for old in pruning.found.values())
        with Rows(Console(stderr=True), "deleting tasks", total) as rows, interruptible(rows) as stop:
            sums["interrupted"] = 1
            for ended, old in pruning.found.items():
                await _rows(store, ended, old["before"], pruning.manner.batch, stop, rows, sums)
            sums["interrupted"] = int(stop.wanted)
        leftovers = await patiently(partial(store.ask, "prune_leftovers"))
        sums.update({name: leftovers[name] for name in ("workers", "tombstones")})
        if pruning.config is not None and not sums["interrupted"]:
            await _blobs(store, pruning, leftovers["due"], sums)
    return sums


async def _rows(store: TaskStore, ended: str, before: str, batch: int, stop: Stop, rows: Rows, sums: Counter[str]) -> None:
    """Those that ended so, in the order in which they did."""
    after: dict[str, Any] | None = None
    while not stop.wanted:
        asked = partial(store.ask, "prune", ended=ended, before=before, after=after, most=batch)
        answer = await patiently(asked)
        after = answer["after"]
        sums.update({name: answer[name] for name in ("deleted", "kept")})
        rows.advance(answer["deleted"] + answer["kept"])
        if after is None:
            return


async def _blobs(store: TaskStore, pruning: Pruning, due: int, sums: Counter[str]) -> None:
    """What tombstones name and is due, and if wanted what lost attempts left."""
    config = pruning.config
    assert config is not None
    sweeper = Sweeper(store, build_blobs(config), config.io_threads, config.timeout_seconds)
    sums["interrupted"] = 1
    try:
        with Rows(Console(stderr=True), "deleting blobs", due) as rows, interruptible(rows) as stop:
            await sweeper.tombstones(stop, rows.advance)
            sums["interrupted"] = int(stop.wanted)
        if pruning.strays and not sums["interrupted"]:
            sums["interrupted"] = 1
            over = await store.ask("prunable", kept=dict.fromkeys(ENDED, 0))
            total = sum(each["count"] for each in over.values())
            with Rows(Console(stderr=True), "looking for strays", total) as rows, interruptible(rows) as stop:
                for ended in ENDED:
                    await sweeper.attempts(ended, stop, rows.advance)
                sums["interrupted"] = int(stop.wanted)
    except UnavailableError as error:  # what was done is told all the same; tombstones stay until their blobs are gone
        typer.echo(f"maskd: {error}", err=True)
    sums["blobs"] = sweeper.deleted
