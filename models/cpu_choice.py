"""Which runtime computes an encoder on this CPU: the one that was named, else the fastest, found by trying and then remembered.

Enters: a file and something to feed it. Leaves: the opened network with the name of its runtime and what was measured. A faster
one counts only if its answers agree with ONNX Runtime's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from models import ort, ov
from models.framing import Floats
from models.graph import Arrays, Graph, in_short
from models.weights import WeightsError

AUTO = "auto"
EXACT, FAST, HALF = "onnxruntime", "openvino", "openvino-bf16"
RUNTIMES = (EXACT, FAST, HALF)
"""The most exact first."""
ERROR_MAX = {FAST: 0.001, HALF: 0.02}
"""How far an embedding may lie from ONNX Runtime's: the norm of the difference over the norm."""
PENALTY = {EXACT: 1.0, FAST: 1.1, HALF: 1.2}
"""What a time counts for: a runtime that is less exact, or installed besides, must be worth it."""
HOPELESS = 1.5
"""Who needs this many times the best time is not tried again, and float32 not at all where bfloat16 is so much faster."""
ROUNDS = 3
SECONDS = 1.0
"""No further round begins after these."""
MEMORY_FILE = "cpu_runtimes.json"
MEMORY_BYTES_MAX = 100_000
MEMORIES_MAX = 16
PACKAGES = ("onnxruntime", "onnxruntime-openvino", "openvino")

Sample = Callable[[Graph], Arrays]
"""Something to feed the network with, made when it is known what it takes. Raises WeightsError if that is not an image."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What is to run: a file, its SHA-256, how many threads it gets, and what to try it with."""

    path: Path
    sha256: str
    threads: int
    sample: Sample


@dataclass(frozen=True, slots=True, eq=False)
class Choice:
    """The opened network and its runtime; the best milliseconds of each that was tried, now or when it was remembered."""

    graph: Graph
    runtime: str
    measured_ms: dict[str, float] = field(default_factory=dict)


def choose(subject: Subject, runtime: str = AUTO, memory: Path | None = None) -> Choice:
    """The network on the runtime that was named, or on the best; `memory` is a folder where the answer is kept for the next time.

    Raises WeightsError when the file is no network or the named runtime cannot be had.
    """
    if runtime != AUTO:
        return _named(subject, runtime)
    kept = None if memory is None else _recall(memory, subject)
    if kept is not None:
        with contextlib.suppress(WeightsError):  # it worked once: now it must be found out anew
            return Choice(_opened(subject, kept[0]), *kept)
    choice = _fastest(subject)
    if memory is not None and choice.measured_ms:
        _remember(memory, subject, choice)
    return choice


def _named(subject: Subject, runtime: str) -> Choice:
    if runtime not in RUNTIMES:
        raise WeightsError(f"there is no runtime {runtime}; there are: {', '.join((AUTO, *RUNTIMES))}")
    graph = _opened(subject, runtime)
    if runtime == HALF and (error := _off(subject, graph)) > ERROR_MAX[HALF]:
        raise WeightsError(
            f"{subject.path} in bfloat16 is {error:.1%} off, more than {ERROR_MAX[HALF]:.0%}: take {FAST} or {EXACT}"
        )
    return Choice(graph, runtime)


def _off(subject: Subject, graph: Graph) -> float:
    """How far a graph lies from ONNX Runtime's answer; NaN where that is none, which is not the runtime's fault."""
    exact = _opened(subject, EXACT)
    feeds = subject.sample(exact)
    try:
        return _difference(_timed(graph, feeds)[0], _timed(exact, feeds)[0])
    except Exception as error:  # the libraries' errors have no common parent
        raise WeightsError(f"{subject.path} fails on an image: {in_short(error)}") from error


def _opened(subject: Subject, runtime: str) -> Graph:
    if runtime == EXACT:
        return ort.open_graph(subject.path, subject.threads)
    return ov.open_graph(subject.path, subject.threads, half=runtime == HALF)


def _fastest(subject: Subject) -> Choice:
    """The most exact runtime that no other beats clearly. What fails on ONNX Runtime stays there, to fail again aloud."""
    graphs = {EXACT: _opened(subject, EXACT)}
    rivals = _rivals()
    if not rivals:
        return Choice(graphs[EXACT], EXACT)
    feeds = subject.sample(graphs[EXACT])
    try:
        expected, took = _timed(graphs[EXACT], feeds)
    except Exception:  # as above
        return Choice(graphs[EXACT], EXACT)
    seconds = {EXACT: took}
    for name in rivals:
        with contextlib.suppress(Exception):  # as above; whoever fails is no rival
            graph = _opened(subject, name)
            found, took = _timed(graph, feeds)
            if _difference(found, expected) <= ERROR_MAX[name]:
                graphs[name], seconds[name] = graph, took
        if HOPELESS * min(seconds.values()) < seconds[EXACT]:
            break
    _try_again(graphs, feeds, seconds)
    best = min(graphs, key=lambda name: seconds[name] * PENALTY[name])
    return Choice(graphs[best], best, {name: round(each * 1000, 1) for name, each in seconds.items()})


def _rivals() -> list[str]:
    """What could take ONNX Runtime's place here, the most promising first."""
    try:
        return [HALF, FAST] if ov.computes_bf16() else [FAST]
    except WeightsError:
        return []


def _difference(found: Floats, expected: Floats) -> float:
    """The relative error of an embedding; NaN when either holds one."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def _try_again(graphs: Mapping[str, Graph], feeds: Arrays, seconds: dict[str, float]) -> None:
    """Improve on the first runs, which warmed up; in rounds, so that a neighbour's load meets all alike."""
    began = time.perf_counter()
    for _ in range(ROUNDS):
        hopeful = [name for name in graphs if seconds[name] <= HOPELESS * min(seconds.values())]
        if len(hopeful) == 1 or time.perf_counter() - began > SECONDS:
            break
        for name in hopeful:
            seconds[name] = min(seconds[name], _timed(graphs[name], feeds)[1])


def _timed(graph: Graph, feeds: Arrays) -> tuple[Floats, float]:
    """The embedding, and how many seconds it took."""
    began = time.perf_counter()
    (embedding,) = graph.run(None, feeds)
    return embedding, time.perf_counter() - began


def _recall(memory: Path, subject: Subject) -> tuple[str, dict[str, float]] | None:
    """What was found out on this host about this file with these threads and packages."""
    host = _host(subject)
    for entry in _entries(memory / MEMORY_FILE):
        if all(entry.get(name) == value for name, value in host.items()):
            return entry["runtime"], entry["measured_ms"]
    return None


def _remember(memory: Path, subject: Subject, choice: Choice) -> None:
    """Note it, in place of what was known; a folder that cannot be written costs a second at the next start, no more."""
    host = _host(subject)
    others = [entry for entry in _entries(memory / MEMORY_FILE) if any(entry.get(name) != value for name, value in host.items())]
    entries = [{**host, "runtime": choice.runtime, "measured_ms": choice.measured_ms}, *others][:MEMORIES_MAX]
    part = memory / f"{MEMORY_FILE}.{os.getpid()}.part"
    with contextlib.suppress(OSError):
        memory.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
            part.replace(memory / MEMORY_FILE)
        finally:
            part.unlink(missing_ok=True)


def _entries(path: Path) -> list[dict[str, Any]]:
    """What a memory holds and can be used; nothing when it is missing or damaged."""
    try:
        with path.open("rb") as file:
            found = json.loads(file.read(MEMORY_BYTES_MAX))
    except (OSError, ValueError, RecursionError):
        return []
    return [entry for entry in found if _usable(entry)] if isinstance(found, list) else []


def _usable(entry: Any) -> bool:
    if not isinstance(entry, dict) or entry.get("runtime") not in RUNTIMES or not isinstance(entry.get("measured_ms"), dict):
        return False
    return all(isinstance(each, int | float) for each in entry["measured_ms"].values())


def _host(subject: Subject) -> dict[str, Any]:
    """All that the answer hangs on."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {"sha256": subject.sha256, "cpu": _cpu(), "threads": subject.threads, "packages": versions}


def _cpu() -> str:
    """The name of the CPU and a digest of what it can do, since virtual machines hide the name."""
    told = {}
    with contextlib.suppress(OSError):
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines())
        told = {name.strip(): value.strip() for name, _, value in lines}
    flags = hashlib.sha256(told.get("flags", told.get("Features", "")).encode()).hexdigest()[:8]
    return f"{told.get('model name', platform.machine())} {flags}"
