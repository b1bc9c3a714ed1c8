"""SAM 3's weights from a file or folder into the two networks of transformers that read them.

Enters: a folder of the hub, a safetensors file or Meta's `sam3.pt`. Leaves: a detector and a tracker on a device, whole, or a
WeightsError that names the file and says what is wrong. Nothing is fetched, and no code of the file's is run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.sam3_layout import State, from_meta
from models.torch_device import Placement
from models.weights import WeightsError, check

NAMES = ("model.safetensors", "sam3.pt")
INDEX = "model.safetensors.index.json"
CONFIGURATION = "config.json"
SHOWN = 3
"""How many of many names an error lists."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Weights by network, under transformers' names, and what the networks are built like. `tracker` may be empty."""

    file: Path
    checksum: str
    detector: State
    tracker: State
    detector_config: Any
    tracker_config: Any


def read(path: Path) -> Checkpoint:
    """What a folder or file holds; every file is held to its checksum, once."""
    files = _files(path)
    checksums = [check(file) for file in files]
    checksum = checksums[0] if len(files) == 1 else hashlib.sha256("".join(checksums).encode()).hexdigest()
    tensors: State = {}
    for file in files:
        tensors |= _tensors(file)
    detector, tracker = _by_network(tensors, files[0])
    return Checkpoint(files[0], checksum, detector, tracker, *_configurations(files[0].parent / CONFIGURATION))


def networks(checkpoint: Checkpoint, placement: Placement) -> tuple[Any, Any | None]:
    """The detector, in the precision of the placement, and the tracker in full precision, its ViT left out, or None.

    Only weights are cast: the frequencies of rotary positions, which no file holds, stay exact.
    """
    from transformers import Sam3Model, Sam3TrackerModel

    detector = _network(
        lambda: Sam3Model(checkpoint.detector_config),
        {name: _cast(tensor, placement.dtype) for name, tensor in checkpoint.detector.items()},
        checkpoint.file,
    )
    if not checkpoint.tracker:
        return detector.to(placement.device), None
    tracker = _network(
        lambda: _without_vit(Sam3TrackerModel(checkpoint.tracker_config)),
        {name: _cast(tensor, None) for name, tensor in checkpoint.tracker.items()},
        checkpoint.file,
    )
    return detector.to(placement.device), tracker.to(placement.device)


def _files(path: Path) -> list[Path]:
    """The files that hold the weights, one or several."""
    if not path.exists():
        raise WeightsError(f"there is no {path}")
    if not path.is_dir():
        return [path]
    if (path / INDEX).is_file() and not (path / NAMES[0]).is_file():
        shards = _json(path / INDEX).get("weight_map", {}).values()
        return [path / name for name in dict.fromkeys(shards)]
    for name in NAMES:
        if (path / name).is_file():
            return [path / name]
    raise WeightsError(f"{path} holds no weights of SAM 3: neither {' nor '.join(NAMES)}")


def _tensors(file: Path) -> State:
    """The tensors of a file by name."""
    import torch
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return dict(load_file(file))
        held = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # both libraries raise what they like at a damaged file
        reason = " ".join(str(error).split())[:160]
        raise WeightsError(f"{file} is no file of weights that can be read, or is cut short: {reason}") from error
    for wrapper in ("model", "state_dict"):
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
    if not isinstance(held, dict) or not all(torch.is_tensor(tensor) for tensor in held.values()):
        raise WeightsError(f"{file} holds something else than tensors by name")
    return held


def _by_network(tensors: State, file: Path) -> tuple[State, State]:
    """The detector's and the tracker's tensors, from any of the three layouts."""
    if any(name.startswith("detector_model.") for name in tensors):
        tracker = _below("tracker_model.", tensors)
        neck = {f"vision_encoder.neck.{name}": tensor for name, tensor in _below("tracker_neck.", tensors).items()}
        return _below("detector_model.", tensors), tracker | neck if tracker else {}
    if any(name.startswith("detector.") for name in tensors):
        return from_meta(tensors)
    if any(name.startswith("vision_encoder.backbone.") for name in tensors):
        return tensors, {}
    raise WeightsError(f"{file} holds no SAM 3: its names are like {_some(tensors)}")


def _below(prefix: str, tensors: State) -> State:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _configurations(file: Path) -> tuple[Any, Any]:
    """How detector and tracker are built: as the file says, else as released, which is how the library builds them unasked."""
    from transformers import Sam3Config, Sam3TrackerConfig

    said = _json(file) if file.is_file() else {}
    kind = said.get("model_type", "sam3_video")
    if kind not in ("sam3_video", "sam3"):
        raise WeightsError(f"{file} is the configuration of a {kind}, not of SAM 3")
    of_detector = said if kind == "sam3" else said.get("detector_config") or {}
    of_tracker = {} if kind == "sam3" else said.get("tracker_config") or {}
    try:
        detector = Sam3Config.from_dict(of_detector)
        vision = detector.vision_config.to_dict()
        backbone = vision["backbone_config"]
        sizes = {"image_size": backbone["image_size"], "patch_size": backbone["patch_size"]}
        tracker = Sam3TrackerConfig(
            vision_config=vision | {"backbone_config": backbone | {"num_hidden_layers": 0}},
            prompt_encoder_config=(of_tracker.get("prompt_encoder_config") or {}) | sizes,
            mask_decoder_config=of_tracker.get("mask_decoder_config") or {},
        )
    except Exception as error:  # its checks raise errors of several libraries
        raise WeightsError(f"{file} is no configuration that can be used: {' '.join(str(error).split())[:200]}") from error
    return detector, tracker


def _json(file: Path) -> dict[str, Any]:
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise WeightsError(f"{file} is damaged: {error}") from error
    if not isinstance(said, dict):
        raise WeightsError(f"{file} is damaged: it holds no object")
    return said


def _network(make: Callable[[], Any], state: State, file: Path) -> Any:
    """A network with these weights, all of them and no more layers than it has. The tensors become its own, uncopied."""
    from transformers.initialization import no_init_weights

    with no_init_weights():
        network = make().eval()
    expected = network.state_dict()
    missing = [name for name in expected if name not in state]
    if missing:
        raise WeightsError(f"{file} lacks {len(missing)} of {len(expected)} weights, {_some(missing)} among them")
    like_ours = {re.sub(r"\d+", "#", name) for name in expected}
    extra = [name for name in state if name not in expected and re.sub(r"\d+", "#", name) in like_ours]
    if extra:
        raise WeightsError(f"{file} has more layers than its configuration says: {_some(extra)}")
    for name, own in expected.items():
        if state[name].shape != own.shape:
            raise WeightsError(f"{file}: {name} has the shape {tuple(state[name].shape)}, not {tuple(own.shape)}")
        if not state[name].isfinite().all():
            raise WeightsError(f"{file} holds NaN or infinity in {name}: it is damaged")
    network.load_state_dict({name: state[name] for name in expected}, assign=True)
    return network.requires_grad_(False)


def _without_vit(tracker: Any) -> Any:
    """The tracker sees what the detector's ViT saw: the weights of both are the same."""
    import torch

    tracker.vision_encoder.backbone = torch.nn.Identity()
    return tracker


def _cast(tensor: Any, dtype: Any) -> Any:
    """Floating point in the wanted type, float32 where it is None; anything else as it is."""
    import torch

    return tensor.to(dtype or torch.float32) if tensor.is_floating_point() else tensor


def _some(names: Sequence[str] | State) -> str:
    """The first few names."""
    listed = list(names)
    return ", ".join(listed[:SHOWN]) + (", …" if len(listed) > SHOWN else "")
