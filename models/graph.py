"""A network as a CPU runtime holds it: what it takes, what it gives, and a run. ONNX Runtime and OpenVINO look alike from here.

Enters: arrays by name. Leaves: arrays in the order in which they were asked for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy.typing as npt

from models.weights import WeightsError

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Port:
    """An input or output. `shape` holds None for a size that may vary; `dtype` is numpy's name, or the runtime's own."""

    name: str
    shape: tuple[int | None, ...]
    dtype: str


class Graph(Protocol):
    """An opened network; safe on many threads at once."""

    @property
    def inputs(self) -> tuple[Port, ...]: ...
    @property
    def outputs(self) -> tuple[Port, ...]: ...

    def run(self, wanted: Sequence[str] | None, feeds: Arrays) -> list[npt.NDArray[Any]]:
        """The outputs of those names, all of them for None. Raises whatever the runtime raises."""
        ...


def port(graph: Graph, name: str) -> Port:
    """The input or output of that name. Raises WeightsError if there is none."""
    for each in (*graph.inputs, *graph.outputs):
        if each.name == name:
            return each
    raise WeightsError(f"the network has no {name}")


def names(ports: Sequence[Port]) -> tuple[str, ...]:
    """The names of inputs or outputs, in order."""
    return tuple(each.name for each in ports)


def in_short(error: Exception) -> str:
    """A runtime's message on one line, fit for a sentence."""
    return " ".join(str(error).split())[:200]
