"""`maskd doctor`: looks at everything that maskd depends on, and says what to do about what is not well."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from typing import Annotated

import anyio
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from daemon import checkup, checkup_database, checkup_host, log
from daemon.checkup import Line, State
from daemon.commands.run import secrets_of
from daemon.config import Config, load
from daemon.progress import plain
from daemon.stores import way_of

SIGNS = {State.OK: ("✓", "green"), State.WARN: ("!", "yellow"), State.BAD: ("✗", "bold red")}


def doctor(as_json: Annotated[bool, typer.Option("--json", help="For scripts.")] = False) -> None:
    """Check database, storage, weights and this host; 0 when nothing is bad, else 1."""
    config = load()
    way_of(config)  # a wrong MASKD_DB_CA is a wrong configuration, not a database that is away
    log.set_up("error", "text", secrets_of(config))
    logging.disable()  # what is wrong is told by lines
    console = Console()
    if console.is_terminal and not as_json:
        with console.status("looking at everything"):
            lines = anyio.run(examine, config)
    else:
        lines = anyio.run(examine, config)
    show(console, lines, as_json)
    sys.stdout.flush()
    os._exit(int(any(line.state is State.BAD for line in lines)))  # a thread that hangs would hold a plain exit


async def examine(config: Config) -> list[Line]:
    """Every line, with this configuration's secrets redacted."""
    redact = log.redactor(secrets_of(config))

    def told(text: str) -> str:
        return "\n".join(map(plain, redact(text).splitlines()))

    found = await checkup.run(checkup_database.checks(config))  # by itself: times are told
    found += await checkup.run(checkup_host.checks(config))
    return [dataclasses.replace(line, fact=told(line.fact), advice=told(line.advice)) for line in found]


def show(console: Console, lines: Sequence[Line], as_json: bool) -> None:
    """A table on a terminal; elsewhere a line each, its parts apart by tabs."""
    if as_json:
        print(json.dumps([dataclasses.asdict(line) for line in lines], indent=2, ensure_ascii=False))
    elif not console.is_terminal:
        for line in lines:
            print("\t".join((line.state, line.check, line.fact, line.advice)).rstrip())
    else:
        console.print(_table(lines))
        console.print(_summary(lines))


def _table(lines: Sequence[Line]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for (fact, advice), alike in groupby(lines, lambda line: (line.fact, line.advice)):
        line, *others = alike
        sign, style = SIGNS[line.state]
        told = Text(fact)
        if others:  # all that could not be looked at, for one reason
            told.append(f"; nor {', '.join(other.check for other in others)}")
        if advice:
            told.append(f"\n→ {advice}", style="cyan")
        table.add_row(Text(sign, style=style), Text(line.check, style="" if line.state is State.OK else style), told)
    return table


def _summary(lines: Sequence[Line]) -> Text:
    counts = {state: sum(line.state is state for line in lines) for state in State}
    told = [Text(f"{counts[state]} {state}", style=SIGNS[state][1]) for state in State if counts[state]]
    return Text("\n") + Text(", ").join(told)
