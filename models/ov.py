"""Networks on OpenVINO, the package used directly: float32, or bfloat16 where the CPU computes it.

Enters: a path. Leaves: a graph, or WeightsError that says what to install. The only file that imports openvino.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

import numpy.typing as npt

from models.graph import Arrays, Port, in_short
from models.weights import WeightsError

DEVICE = "CPU"
MEND = "run: pip install openvino"


@dataclass(frozen=True, slots=True, eq=False)
class OpenVinoGraph:
    """A `Graph` over one request, which computes one run at a time: the others wait, as they would for its only stream."""

    request: Any
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]
    lock: Lock = field(default_factory=Lock)

    def run(self, wanted: Sequence[str] | None, feeds: Arrays) -> list[npt.NDArray[Any]]:
        """As the protocol says; the answers are copies, which the next run leaves alone."""
        with self.lock:
            answers = self.request.infer(dict(feeds), share_inputs=True)
        return [answers[name] for name in (wanted or [each.name for each in self.outputs])]


def available() -> bool:
    """Whether openvino is installed; does not import it."""
    return importlib.util.find_spec("openvino") is not None


def computes_bf16() -> bool:
    """Whether this CPU has bfloat16 (AMX, AVX512_BF16). Raises WeightsError where openvino is missing or broken."""
    return "BF16" in _library().Core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")


def open_graph(path: Path, threads: int, half: bool = False) -> OpenVinoGraph:
    """The network of a file, computed in float32, with `half` in bfloat16. Raises WeightsError."""
    library = _library()
    if half and not computes_bf16():
        raise WeightsError("this CPU does not compute bfloat16 (Intel AMX, AVX512_BF16): take openvino or onnxruntime")
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": 1,
        "ENABLE_CPU_PINNING": False,  # two daemons of one host would sit on the same cores
    }
    try:
        compiled = library.Core().compile_model(str(path), DEVICE, settings)
    except Exception as error:  # RuntimeError today; its C++ side promises nothing
        raise WeightsError(f"{path} is no network that OpenVINO can open: {in_short(error)}") from error
    return OpenVinoGraph(compiled.create_infer_request(), _ports(compiled.inputs), _ports(compiled.outputs))


def _library() -> Any:
    """The package, kept from calling home: on import it writes into the home folder and reports to an analytics service, unless
    openvino_telemetry cannot be imported."""
    if not available():
        raise WeightsError(f"openvino is not installed; {MEND}")
    modules: dict[str, Any] = sys.modules
    modules.setdefault("openvino_telemetry", None)
    try:
        import openvino
    except Exception as error:  # a library of its own that is missing, or fits no other
        raise WeightsError(f"openvino cannot be imported ({in_short(error)}); {MEND} --force-reinstall") from error
    return openvino


def _ports(values: Any) -> tuple[Port, ...]:
    """Of `compiled.inputs` or `compiled.outputs`."""
    return tuple(Port(value.get_any_name(), _shape(value.partial_shape), value.element_type.to_dtype().name) for value in values)


def _shape(sizes: Any) -> tuple[int | None, ...]:
    return tuple(size.get_length() if size.is_static else None for size in sizes)
