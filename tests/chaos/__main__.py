"""`make chaos`: episodes of faults over real daemons until the time is over; exit status 1 when a check was violated.

`--seconds 300 --seed N --steps 25`. The same seed plays the same plans in the same order.
"""

from __future__ import annotations

import argparse
import importlib
import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def main(words: list[str]) -> int:
    """Play until the time is over; the exit status."""
    parser = argparse.ArgumentParser(prog="make chaos ARGS=")
    parser.add_argument("--seconds", type=float, default=300.0, help="begin no episode after so long (default 300)")
    parser.add_argument("--seed", type=int, default=None, help="play the plans of this seed again")
    parser.add_argument("--steps", type=int, default=25, help="steps in an episode (default 25)")
    options = parser.parse_args(words)
    number = random.SystemRandom().randrange(1_000_000) if options.seed is None else options.seed
    sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[2])]
    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="maskd-chaos-", ignore_cleanup_errors=True) as folder:
        report = importlib.import_module("chaos.run").run(Path(folder), number, options.steps, options.seconds, show=print)
    print(f"\n{report.told()}")
    return 1 if report.violations else 0


def _interrupt(*_: Any) -> None:
    """End as Ctrl-C does: every daemon is ended on the way."""
    raise KeyboardInterrupt


if __name__ == "__main__":
    started = time.monotonic()
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(f"\ninterrupted after {time.monotonic() - started:.0f} s")
