"""`make bench`: runs all benchmarks, or those named as arguments; exit status 1 when a threshold is missed.

Each is a module of this folder with `run(ground, report)`. Ratios count, absolute figures belong to this host.
"""

from __future__ import annotations

import importlib
import sys
import time
from pathlib import Path

ALL = (
    *("drain", "pickup", "claim_scale", "status", "memory", "fairness", "realtime", "idle", "scale"),
    *("mobile_sam", "sessions", "masks_out", "everything", "concept", "gpu", "paint", "combine", "remove"),
)


def main(names: list[str]) -> int:
    """Run the benchmarks; the exit status."""
    unknown = sorted(set(names) - set(ALL))
    if unknown:
        print(f"no benchmark {', '.join(unknown)}; there are: {', '.join(ALL)}", file=sys.stderr)
        return 2
    here = Path(__file__).resolve().parent  # also when run as a folder, python tests/bench, where our names would hide libraries
    sys.path[:] = [str(here.parent), *(path for path in sys.path if Path(path).resolve() != here)]
    ground, report = importlib.import_module("bench.ground"), importlib.import_module("bench.report").Report()
    started = time.monotonic()
    with ground.ground() as made:
        print(ground.host_facts(made.server))
        for name in names or ALL:
            importlib.import_module(f"bench.{name}").run(made, report)
    print(f"\n{report.missed or 'no'} threshold(s) missed, {time.monotonic() - started:.0f} s")
    return 1 if report.missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
