"""The memory of one card, shared by all networks on it: what has not been used for longest makes room for what is about to run.

Enters: networks (torch modules). Leaves: those that are needed on the device, the others in the host's memory. Only the thread
that owns the device calls this.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.torch_device import inference

WEIGHTS_SHARE = 0.6
"""Of the budget; the rest is for activations and embeddings."""


class Card:
    """A device and how many bytes maskd may use of it; None for all that there are."""

    def __init__(self, device: str, budget_bytes: int | None) -> None:
        import torch

        self.device = device
        total = torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else budget_bytes or 1 << 62
        self.budget_bytes = min(budget_bytes or total, total)
        if device.startswith("cuda") and self.budget_bytes < total:
            torch.cuda.set_per_process_memory_fraction(self.budget_bytes / total, device)
        self._resident: dict[int, Any] = {}  # by identity, the least recently used first

    @property
    def resident(self) -> list[Any]:
        """The networks on the device, the least recently used first."""
        return list(self._resident.values())

    def bring(self, networks: Sequence[Any]) -> None:
        """These are about to run: they go to the device, and others leave it until all fit. Raises MemoryError."""
        needed = {id(network): network for network in networks}
        for key, network in needed.items():
            self._resident.pop(key, None)
            self._resident[key] = network
        held = sum(map(weights_bytes, self._resident.values()))
        with inference():
            for key in [key for key in self._resident if key not in needed]:
                if held <= self.budget_bytes * WEIGHTS_SHARE:
                    break
                held -= weights_bytes(self._resident[key])
                self._resident.pop(key).to("cpu")
            for network in needed.values():
                network.to(self.device)  # costs nothing for what is there


def weights_bytes(network: Any) -> int:
    """Bytes of a network's parameters and buffers."""
    return sum(values.nbytes for values in (*network.parameters(), *network.buffers()))
