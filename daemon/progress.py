"""How commands tell what goes on while they work: spinners and bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


def plain(text: str) -> str:
    """What others wrote, fit for a terminal and in one line: control characters could move the cursor, set a title, or worse."""
    return "".join(each if each.isprintable() else " " if each.isspace() else "\N{REPLACEMENT CHARACTER}" for each in text)


def counted(count: int, thing: str) -> str:
    """So many of them, in words."""
    return f"{count:,} {thing}{'' if count == 1 else 's'}"


class Said:
    """Steps one after the other, each of one or many parts; a `with` block holds the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (SpinnerColumn(finished_text="[green]✓"), TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn())
        self._bars = Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal)
        self._bar = self._bars.add_task("", total=1, visible=False)
        self._left = 1

    def __enter__(self) -> Said:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def step(self, what: str, parts: int = 1) -> None:
        """The last step is over, this one begins."""
        self._bars.advance(self._bar, self._left)
        self._bar, self._left = self._bars.add_task(what, total=parts), parts
        self._line(what)

    def part(self, what: str) -> None:
        """One part of the step is over."""
        self._bars.advance(self._bar)
        self._left -= 1
        self._line(f"  {what}")

    def note(self, sentence: str) -> None:
        """Something to know besides, on a terminal too."""
        self._bars.console.print(f"  {sentence}", highlight=False, markup=False, soft_wrap=True)

    def end(self) -> None:
        """Everything is said; the terminal is free."""
        self._bars.advance(self._bar, self._left)
        self._left = 0
        self._bars.stop()

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


class Rows:
    """Many alike, done in batches; a `with` block holds the terminal. Elsewhere a line for each tenth."""

    def __init__(self, console: Console, what: str, total: int) -> None:
        self._console = console
        self._what = what
        self._total = total
        self._done = self._said = 0
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self._bar = self._bars.add_task(what, total=total)

    def __enter__(self) -> Rows:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def advance(self, count: int) -> None:
        """So many more are done."""
        self._done += count
        self._bars.update(self._bar, completed=self._done)
        if not self._console.is_terminal and self._done - self._said >= max(self._total // 10, 1):
            self._said = self._done
            self.note(f"{self._what}: {self._done:,} of {self._total:,}")

    def note(self, sentence: str) -> None:
        """Something to know besides."""
        self._bars.console.print(sentence, highlight=False, markup=False, soft_wrap=True)


class Transfers:
    """Files that come one after the other, in bytes; a `with` block holds the terminal."""

    def __init__(self, console: Console) -> None:
        self._console = console
        columns = (
            TextColumn("{task.description}"),
            BarColumn(24),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
        )
        self._bars = Progress(*columns, console=console, disable=not console.is_terminal)

    def __enter__(self) -> Transfers:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def file(self, name: str) -> Callable[[int, int | None], None]:
        """A file begins; what is returned takes the bytes that are there and those there will be."""
        bar = self._bars.add_task(name, total=None)
        said = False

        def progress(done: int, total: int | None) -> None:
            nonlocal said
            self._bars.update(bar, completed=done, total=total)
            if not said and not self._console.is_terminal:
                size = "" if total is None else f", {total / 1e6:.1f} MB"
                begun = f", going on from {done / 1e6:.1f} MB" if done else ""
                self._console.print(f"fetching {name}{size}{begun}", highlight=False, markup=False, soft_wrap=True)
            said = True

        return progress
