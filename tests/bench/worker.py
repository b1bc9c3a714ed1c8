"""A daemon in a process of its own that serves the no-op kind and prints its memory as it goes: `python -m bench.worker run`."""

from __future__ import annotations

import json

import anyio
import psutil
from bench.ground import KIND
from bench.noop import Noop

from daemon.commands.run import serve, set_up_log
from daemon.config import load
from daemon.main import build

EVERY_ROWS = 2_000


class Scale:
    """Prints the resident memory each time that another `EVERY_ROWS` rows have run."""

    def __init__(self) -> None:
        self._rows = 0
        self._process = psutil.Process()

    def add(self, rows: int) -> None:
        """So many rows more."""
        before, self._rows = self._rows, self._rows + rows
        if before // EVERY_ROWS < self._rows // EVERY_ROWS:
            print(json.dumps({"event": "memory", "rows": self._rows, "rss": self._process.memory_info().rss}), flush=True)


def main() -> None:
    """The command `maskd run`, but for the handler."""
    config = load()
    set_up_log(config)
    anyio.run(serve, build(config, {KIND: Noop(Scale().add)}))


if __name__ == "__main__":
    main()
