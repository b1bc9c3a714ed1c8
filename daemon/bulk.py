"""Commands that touch many tasks: counted first, asked about, then changed in small batches, each a transaction of its own.

Enters: what an operator wants, as options. Leaves: counts. Beside live daemons and other operators at any time; stopped between
two batches (Ctrl-C), what is done is done and the rest is as it was.
"""

from __future__ import annotations

import asyncio
import json
import re
import signal
import sys
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import anyio
import typer
from rich.console import Console

from daemon.config import store_config
from daemon.progress import Rows
from daemon.stores import build_store
from storage.base import TaskStore, UnavailableError

PAGE = 50_000
BATCH = 500
ASK_ABOVE = 20
TRIES = 4
AGAIN_SECONDS = 0.3
BUSY_ROUNDS = 5
STOPPING = (signal.SIGINT, signal.SIGTERM)
SPAN_SECONDS_MAX = 100 * 365 * 86400
"""Further back no database counts."""
UNITS = {"s": 1, "m": 60, "min": 60, "h": 3600, "d": 86400, "w": 604800}
Answer = TypeVar("Answer")

Batch = typer.Option(help="Tasks in one transaction.", min=1, max=10_000)
Yes = typer.Option("--yes", "-y", help="Do not ask.")
DryRun = typer.Option("--dry-run", help="Only say how many.")
AsJson = typer.Option("--json", help="For scripts.")
AskAbove = typer.Option("--ask-above", help="On a terminal, ask before more than so many are touched.", min=0)


@dataclass(frozen=True, slots=True)
class Manner:
    """How a command goes about it."""

    yes: bool = False
    dry_run: bool = False
    as_json: bool = False
    batch: int = BATCH
    ask_above: int = ASK_ABOVE


class Stop:
    """Whether somebody wants no further batch."""

    def __init__(self) -> None:
        self.wanted = False


def seconds_of(text: str) -> float:
    """A time span such as 90s, 30m, 2h, 7d; typer.BadParameter for what is none."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]+)", text.strip().lower())
    if found is None or found[2] not in UNITS:
        raise typer.BadParameter(f"{text} is no time span; write one such as 90s, 30m, 2h, 7d")
    seconds = float(found[1]) * UNITS[found[2]]
    if seconds > SPAN_SECONDS_MAX:
        raise typer.BadParameter(f"{text[:40]} is more than a hundred years")
    return seconds


def ids_of(texts: Sequence[str] | None) -> list[str] | None:
    """Ids of tasks; typer.BadParameter for what is none."""
    try:
        return [str(uuid.UUID(text)) for text in texts] if texts else None
    except ValueError:
        raise typer.BadParameter("a task's id is a UUID, such as maskd status and maskd submit show it") from None


def project_of(text: str | None) -> str | None:
    """The id of a project; typer.BadParameter for what is none."""
    try:
        return None if text is None else str(uuid.UUID(text))
    except ValueError:
        raise typer.BadParameter("a project's id is a UUID: the column id of projects") from None


def confirmed(question: str, count: int, manner: Manner) -> bool:
    """Whether to go on: asked on a terminal, when it is about more than a few."""
    if manner.yes or count <= manner.ask_above or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    return typer.confirm(question)


def tell(manner: Manner, sentence: str, **facts: Any) -> None:
    """The answer of a command."""
    typer.echo(json.dumps(facts) if manner.as_json else sentence)


@asynccontextmanager
async def opened() -> AsyncIterator[TaskStore]:
    """The queue that the settings name."""
    store = build_store(store_config())
    await store.open()
    try:
        yield store
    finally:
        await store.close()


@contextmanager
def interruptible(rows: Rows) -> Iterator[Stop]:
    """Ctrl-C or SIGTERM stops before the next batch; a second one at once, and the batch in hand is undone, or done."""
    stop, loop = Stop(), asyncio.get_running_loop()
    with anyio.CancelScope() as scope:

        def hear() -> None:
            if stop.wanted:
                scope.cancel()
            stop.wanted = True
            rows.note("stopping after this batch …")

        for number in STOPPING:
            loop.add_signal_handler(number, hear)
        try:
            yield stop
        finally:
            for number in STOPPING:
                loop.remove_signal_handler(number)


async def patiently(call: Callable[[], Awaitable[Answer]]) -> Answer:
    """A call that may be made again, made again: the database was away for a moment, or undid it for another's sake."""
    for turn in range(1, TRIES):
        try:
            return await call()
        except UnavailableError:
            await anyio.sleep(AGAIN_SECONDS * turn)
    return await call()


async def count(wanted: dict[str, Any]) -> dict[str, Any]:
    """How many tasks are wanted, and until when they were made: `count` and `until`."""
    async with opened() as store:
        found: dict[str, Any] = await store.ask("find", wanted=wanted | {"most": 1})
        return found


async def change(function: str, wanted: dict[str, Any], found: dict[str, Any], doing: str, manner: Manner) -> Counter[str]:
    """Call `function` for all that `count` found, batch by batch. Adds up the numbers that it answers; `interrupted` is 1 when it
    was stopped before the end."""
    sums: Counter[str] = Counter()
    busy: list[str] = []
    async with opened() as store:
        with Rows(Console(stderr=True), doing, found["count"]) as rows, interruptible(rows) as stop:
            sums["interrupted"] = 1
            async for ids in _batches(store, wanted | {"until": found["until"]}, found["count"], manner.batch):
                if stop.wanted:
                    break
                busy += await _change(store, function, ids, sums)
                rows.advance(len(ids))
            else:
                sums["interrupted"] = int(await _again(store, function, busy, sums, stop, manner.batch))
    return sums


async def _batches(store: TaskStore, wanted: dict[str, Any], most: int, size: int) -> AsyncIterator[list[str]]:
    """The ids that are wanted, `size` at a time, `most` of them."""
    after: dict[str, Any] | None = None
    while most > 0:
        asked = wanted | {"after": after, "most": PAGE}
        page = await patiently(lambda asked=asked: store.ask("find", wanted=asked))  # type: ignore[misc]
        ids, after = page["ids"][:most], page["after"]
        most -= len(ids) if len(ids) == PAGE else most  # a page that is not full is the last one
        for first in range(0, len(ids), size):
            yield ids[first : first + size]


async def _change(store: TaskStore, function: str, ids: Sequence[str], sums: Counter[str]) -> list[str]:
    """One batch; those that somebody held."""
    answer = await patiently(lambda: store.ask(function, ids=list(ids)))
    busy: list[str] = answer.pop("busy", [])
    sums.update(answer)
    return busy


async def _again(store: TaskStore, function: str, busy: list[str], sums: Counter[str], stop: Stop, size: int) -> bool:
    """What was held is asked for again a few times, since it is held for moments; whether it was stopped."""
    for _ in range(BUSY_ROUNDS):
        if not busy or stop.wanted:
            break
        await anyio.sleep(AGAIN_SECONDS)
        waiting, busy = busy, []
        for first in range(0, len(waiting), size):
            busy += await _change(store, function, waiting[first : first + size], sums)
    return stop.wanted and bool(busy)
