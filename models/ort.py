"""Networks on ONNX Runtime: which provider, how many threads, and a reason in words when a file cannot be used.

Enters: a path. Leaves: a graph that is checked for what it really runs on. The only file that imports onnxruntime.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from models.graph import Arrays, Port, in_short
from models.weights import WeightsError

PREFERRED = ("OpenVINOExecutionProvider", "DnnlExecutionProvider", "CPUExecutionProvider")
QUIET = 3
"""Errors only: which node runs where is of no interest to an operator."""


@dataclass(frozen=True, slots=True, eq=False)
class OrtGraph:
    """A `Graph` over a session."""

    session: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    def run(self, wanted: Sequence[str] | None, feeds: Arrays) -> list[npt.NDArray[Any]]:
        """As the protocol says; runs of several threads share the session's threads."""
        answers: list[npt.NDArray[Any]] = self.session.run(None if wanted is None else list(wanted), dict(feeds))
        return answers


def available() -> bool:
    """Whether onnxruntime is installed; does not import it."""
    return importlib.util.find_spec("onnxruntime") is not None


def open_graph(path: Path, threads: int) -> OrtGraph:
    """The network of a file. Raises WeightsError."""
    session = open_session(path, threads)
    return OrtGraph(session, _ports(session.get_inputs()), _ports(session.get_outputs()))


def open_session(path: Path, threads: int) -> Any:
    """A session on the first of OpenVINO, DNNL and CPU that this wheel has and that takes the file. Raises WeightsError.

    A provider that fails leaves its work to the CPU without a word, so each is tried by itself and asked afterwards.
    """
    import onnxruntime

    present = onnxruntime.get_available_providers()
    for provider in (name for name in PREFERRED if name in present):
        try:
            session = onnxruntime.InferenceSession(
                str(path), _options(threads), providers=[(provider, _provider_options(provider, threads))]
            )
        except Exception as error:  # the library's errors have no common parent
            if provider != PREFERRED[-1]:
                continue
            raise WeightsError(f"{path} is no network that ONNX Runtime can open: {in_short(error)}") from error
        if session.get_providers()[0] == provider:
            return session
    raise WeightsError(f"this onnxruntime offers none of {', '.join(PREFERRED)}")


def _ports(values: Any) -> tuple[Port, ...]:
    """Of `get_inputs()` or `get_outputs()`; a size that varies is a name there, or None."""
    return tuple(
        Port(value.name, tuple(size if isinstance(size, int) else None for size in value.shape), _dtype(value.type))
        for value in values
    )


def _dtype(name: str) -> str:
    return {"tensor(float)": "float32", "tensor(float16)": "float16"}.get(name, name)


def _options(threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads  # the wheel does not read OMP_NUM_THREADS
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    options.log_severity_level = QUIET
    # A thread that spins for work burns a core after every run: a daemon has neighbours.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.inter_op.allow_spinning", "0")
    return options


def _provider_options(provider: str, threads: int) -> dict[str, str]:
    if provider != PREFERRED[0]:
        return {}
    return {"device_type": "CPU", "load_config": json.dumps({"CPU": {"INFERENCE_NUM_THREADS": str(threads)}})}
