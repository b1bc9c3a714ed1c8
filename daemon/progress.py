"""How commands tell what goes on while they work: spinners and bars on a terminal, plain lines elsewhere."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn


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

    def end(self) -> None:
        """Everything is said; the terminal is free."""
        self._bars.advance(self._bar, self._left)
        self._left = 0
        self._bars.stop()

    def _line(self, text: str) -> None:
        if not self._console.is_terminal:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)
