"""`maskd watch`: the queue as it moves, until q or Ctrl-C. One query every two seconds; daemons are not asked.

Where standard output is no terminal it prints what there is once, as `maskd status` does.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Annotated, Any

import anyio
import typer
from rich.console import Console
from rich.live import Live
from rich.text import Text

from daemon.board import board
from daemon.commands.status import ask_status, show
from daemon.config import store_config
from daemon.gate import AWAY
from daemon.progress import plain
from daemon.stores import build_store
from storage.base import RefusedError, TaskStore

RESIZE_SECONDS = 0.2
QUIT = (b"q", b"Q", b"\x03", b"\x04")


def watch(every: Annotated[float, typer.Option(help="Seconds between two looks.", min=0.2, max=3600.0)] = 2.0) -> None:
    """The queue as it moves: backlog, rates, stages, workers, progress, errors. q or Ctrl-C ends it."""
    console = Console()
    if not console.is_terminal:
        show(anyio.run(ask_status), console)
        return
    with contextlib.suppress(KeyboardInterrupt):
        anyio.run(_watch, console, every)


@contextlib.contextmanager
def _terminal(live: Live) -> Iterator[None]:
    """The screen is ours, and keys come one by one and unseen; afterwards all is as it was."""
    if not sys.stdin.isatty():
        with live:
            yield
        return
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        with live:
            yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)


async def _watch(console: Console, every: float) -> None:
    store = build_store(store_config())
    await store.open()
    live = Live(console=console, screen=True, auto_refresh=False)
    try:
        with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGTSTP) as signals:
            while await _shown(store, console, live, every, signals):
                os.kill(os.getpid(), signal.SIGSTOP)  # Ctrl-Z: the shell has its terminal, until fg
    finally:
        await store.close()


async def _shown(store: TaskStore, console: Console, live: Live, every: float, signals: AsyncIterator[signal.Signals]) -> bool:
    """Show it until somebody wants to leave, for a while (True) or for good."""
    for_a_while = False
    with _terminal(live):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(_look, store, console, live, every)

            async def hear() -> None:
                nonlocal for_a_while
                for_a_while = await anext(signals) == signal.SIGTSTP
                tasks.cancel_scope.cancel()

            tasks.start_soon(hear)
            await _quit()
            tasks.cancel_scope.cancel()
    return for_a_while


async def _quit() -> None:
    """Return when somebody wants to leave. Ctrl-C is a signal, which cancels us."""
    while sys.stdin.isatty():
        await anyio.wait_readable(sys.stdin)
        key = os.read(sys.stdin.fileno(), 1)
        if not key or key in QUIT:
            return
    await anyio.sleep_forever()


async def _look(store: TaskStore, console: Console, live: Live, every: float) -> None:
    """Show what the database says, for ever; the last answer stays while it says nothing."""
    found: dict[str, Any] | None = None
    at = 0.0
    while True:
        trouble, until = "", time.monotonic() + every
        try:
            found, at = await store.status(), time.monotonic()
        except (*AWAY, RefusedError) as error:
            trouble = plain(str(error))
        drawn = None
        while (left := until - time.monotonic()) > 0 or drawn is None:
            if drawn != console.size:  # between two looks the terminal may change
                drawn = console.size
                note = _note(every, trouble, None if found is None else time.monotonic() - at)
                live.update(note if found is None else board(found, drawn.width, drawn.height, note), refresh=True)
            await anyio.sleep(min(max(left, 0), RESIZE_SECONDS))


def _note(every: float, trouble: str, age_seconds: float | None) -> Text:
    """The last line."""
    clock = time.strftime("%H:%M:%S")
    if trouble:
        since = "" if age_seconds is None else f"{age_seconds:.0f} s old: "
        return Text(f"{clock}  {since}{trouble}", style="bold red", no_wrap=True, overflow="ellipsis")
    return Text(f"{clock}  every {every:g} s  q quits", style="dim", no_wrap=True, overflow="ellipsis")
