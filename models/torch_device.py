"""Torch as the engines need it: which device, which precision, and its errors in words.

Enters: what the operator asked for. Leaves: a `Placement` that works, or WeightsError that says what to install or set. No file
outside `models/` imports torch.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from models.base import DeviceLostError
from models.weights import WeightsError

NEEDED = ("torch", "transformers")
OLDEST = (2, 7)
OUT_OF_MEMORY = ("DefaultCPUAllocator", "CUDA out of memory")
"""What RuntimeErrors hold that mean MemoryError: the CPU's allocator, and what TorchScript leaves of torch.OutOfMemoryError."""
CUDA_ERRORS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS", "cuDNN error", "device-side assert")
"""How torch's RuntimeErrors begin, or what they hold, after which the context answers nothing any more."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a network lives and how it computes. `device` as torch names it (cpu, cuda:0), `half` = bfloat16."""

    device: str = "cpu"
    half: bool = False
    compiled: bool = False

    @property
    def dtype(self) -> Any:
        """The type of weights and activations; prompts stay float32."""
        import torch

        return torch.bfloat16 if self.half else torch.float32


def missing(*more: str) -> list[str]:
    """Which packages the torch engines, and `more`, lack here; imports none."""
    return [name for name in (*NEEDED, *more) if importlib.util.find_spec(name) is None]


def require() -> None:
    """Raise WeightsError, with the command that mends it, where the torch engines cannot even be imported."""
    lacking = missing()
    if lacking:
        raise WeightsError(f"{' and '.join(lacking)} {'is' if len(lacking) == 1 else 'are'} not installed; run: make torch")
    version = importlib.metadata.version("torch")
    if tuple(int(part) for part in version.split("+")[0].split(".")[:2]) < OLDEST:
        raise WeightsError(
            f"torch {version} is too old: {'.'.join(map(str, OLDEST))} or later is needed; run: pip install -U torch"
        )
    if (mistake := broken_torchvision()) is not None:
        raise WeightsError(mistake)


def broken_torchvision() -> str | None:
    """What is wrong with torchvision, if it is installed and cannot be imported: transformers imports it whenever it is there."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except Exception as error:  # it fails with whatever its operators fail with
        reason = " ".join(str(error).split())[:120]
        return f"torchvision is broken ({reason}) and maskd does not need it; run: pip uninstall torchvision"
    return None


def cuda_devices() -> list[str]:
    """The usable CUDA devices by name, none where torch is missing or sees none."""
    if importlib.util.find_spec("torch") is None:
        return []
    import torch

    return [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []


def why_no_cuda() -> str:
    """Why there is no usable CUDA device: the wheel, or the driver."""
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build without CUDA; run: pip uninstall -y torch && pip install torch"
    return (
        f"torch {torch.__version__} was built for CUDA {torch.version.cuda} but sees no device: "
        "is there an NVIDIA driver for it (nvidia-smi), and is the device visible (CUDA_VISIBLE_DEVICES)?"
    )


def memory(device: str, budget_bytes: int | None) -> dict[str, int]:
    """Bytes of a device: all that it has, what maskd may use of it, what its tensors take, what it holds. Torch's own counts."""
    import torch

    total = torch.cuda.get_device_properties(device).total_memory
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    return {"total": total, "budget": min(budget_bytes or total, total), "allocated": allocated, "reserved": reserved}


def details(network: Any, placement: Placement) -> dict[str, Any]:
    """What a network in torch tells of itself: its precision, and how many parameters it has."""
    return {"precision": "bf16" if placement.half else "fp32", "parameters": sum(each.numel() for each in network.parameters())}


def use_threads(count: int) -> None:
    """How many threads torch computes with on the CPU."""
    import torch

    if torch.get_num_threads() != count:
        torch.set_num_threads(count)


@contextlib.contextmanager
def inference() -> Iterator[None]:
    """Without gradients, and with torch's errors as the pool knows them: MemoryError, DeviceLostError."""
    import torch

    try:
        with torch.inference_mode():
            yield
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        raise MemoryError("the device is out of memory") from error
    except RuntimeError as error:
        if any(sign in str(error) for sign in OUT_OF_MEMORY):
            raise MemoryError("there is not enough memory") from error
        if any(sign in str(error) for sign in CUDA_ERRORS):
            raise DeviceLostError(" ".join(str(error).split())[:200]) from error
        raise
