"""A benchmark's own process of one thread, so that neither side is helped by other cores, nor weighed down by what ran before."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.report import Report
from support.daemons import ROOT

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OPENCV_FOR_THREADS_NUM")
SECONDS_MAX = 600


def answer(module: str, *arguments: str) -> Any:
    """What `python -m module arguments` printed as its last line, which is JSON."""
    values = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)]), **dict.fromkeys(THREADS, "1")}
    command = [sys.executable, "-m", module, *arguments]
    done = subprocess.run(command, env=values, cwd=ROOT, stdout=subprocess.PIPE, text=True, timeout=SECONDS_MAX, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def held_bytes(highest: bool = False) -> int:
    """The memory that this process holds, or the most that it has ever held. Not `ru_maxrss`: a child inherits its parent's."""
    field = "VmHWM:" if highest else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def lacks(report: Report, modules: Sequence[str]) -> bool:
    """Whether any of these is not installed, which the report then says."""
    lacking = [module for module in modules if importlib.util.find_spec(module) is None]
    if lacking:
        report.note(f"skipped: it needs {', '.join(lacking)}")
    return bool(lacking)
