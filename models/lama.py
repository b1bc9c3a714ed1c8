"""LaMa: what might have been behind a hole, by a network that sees all of a crop at once (arXiv 2109.07161).

Enters: `big-lama.pt`, a TorchScript file, or an ONNX file of the same network; then holes. Leaves: patches as the network painted
them, to be put under the mask by others. torch is imported only for a TorchScript file, ONNX Runtime only for an ONNX file.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from models import ort
from models.base import DeviceLostError, Hole, ImageHWC, Patch, Stop
from models.crops import Cut, batches, crops, cut, patch, shrunk_hw
from models.graph import Graph, Port, in_short
from models.torch_device import Placement, inference, require, use_threads
from models.weights import WeightsError, check

SCRIPT_FILE, ONNX_FILE = "big-lama.pt", "lama_fp32.onnx"
BUCKET = 64
"""Sides are padded to a multiple of it, so that holes of about one size run together. The network itself asks for one of 8."""
SIDE_MAX = 1024
BATCH_MAX, BATCH_MAX_CPU = 4, 1
TRIAL_SIDE = 128
BRIGHTEST = 1.5
"""No network whose white is 1 answers more; one whose white is 255 does, to a grey image."""

Floats = npt.NDArray[np.float32]
Network = Callable[[Floats, Floats], Floats]
"""Images (n, 3, h, w), 0..1, black where anything is missing, and what is missing (n, 1, h, w), 1 = missing, to images of the
same shape; their white is 1 or 255."""


@dataclass(frozen=True, slots=True, eq=False)
class Lama:
    """Inpainter; safe on many threads at once. `load` makes one.

    Crops longer than `side_max` are reduced for the network. With `square` it takes crops of exactly that side only. `network` is
    the torch module, None with ONNX Runtime.
    """

    paint: Network
    model_id: str
    runtime: str
    device: str = "cpu"
    side_max: int = SIDE_MAX
    square: int | None = None
    batch_max: int = BATCH_MAX_CPU
    white: float = 1.0
    network: Any = None
    engine: str = "lama"

    def details(self) -> dict[str, Any]:
        """What /health tells besides: runtime, precision, and where it is known how many parameters there are."""
        told = {"runtime": self.runtime, "precision": "float32"}
        if self.network is None:
            return told
        return told | {"parameters": sum(values.numel() for values in self.network.parameters())}

    def inpaint(self, holes: Sequence[Hole], stop: Stop) -> list[list[Patch]]:
        """Per hole the patches that cover its mask; crops of one size run together, whichever image they are from."""
        boxes = [crops(hole.mask, hole.image_hwc.shape[:2]) for hole in holes]
        places = [(index, box) for index, own in enumerate(boxes) for box in own]
        patches: dict[tuple[int, tuple[int, int, int, int]], Patch] = {}
        for batch in batches([self._framed_hw((y1 - y0, x1 - x0)) for _, (x0, y0, x1, y1) in places], self.batch_max):
            stop()
            cuts = [cut(holes[index], box, self.side_max) for index, box in (places[each] for each in batch)]
            for each, pixels_hwc in zip(batch, self._painted(cuts), strict=True):
                patches[places[each]] = patch(places[each][1], pixels_hwc)
        return [[patches[index, box] for box in own] for index, own in enumerate(boxes)]

    def _painted(self, cuts: Sequence[Cut]) -> list[ImageHWC]:
        """New pixels for cuts that are padded to the same size, each of its own size. Raises FloatingPointError for NaN."""
        framed_hw = self._framed_hw(cuts[0].missing_hw.shape)
        missing_nhw = np.stack([_padded(each.missing_hw, framed_hw) for each in cuts])
        images_nhwc = np.stack([_padded(each.pixels_hwc, framed_hw) for each in cuts])
        images_nhwc[missing_nhw > 0] = 0
        images = np.ascontiguousarray(images_nhwc.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)
        answer = self.paint(images, missing_nhw[:, None].astype(np.float32))
        if not np.isfinite(answer).all():
            raise FloatingPointError("the network computed NaN or infinity")
        painted_nhwc = (answer * (255 / self.white)).round().clip(0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        sizes = [each.missing_hw.shape for each in cuts]
        return [pixels[:height, :width] for pixels, (height, width) in zip(painted_nhwc, sizes, strict=True)]

    def _framed_hw(self, size_hw: tuple[int, ...]) -> tuple[int, int]:
        """The size at which the network sees a crop of that size."""
        if self.square is not None:
            return self.square, self.square
        height, width = shrunk_hw((size_hw[0], size_hw[1]), self.side_max)
        return -(-height // BUCKET) * BUCKET, -(-width // BUCKET) * BUCKET


def load(path: Path, placement: Placement, threads: int, side_max: int = SIDE_MAX) -> Lama:
    """The engine made of a file, tried once on a grey image. An ONNX file runs on the CPU wherever `placement` points to, and
    TorchScript in float32 even on a GPU: half precision overflows in the Fourier transforms. `threads` are those of the CPU.

    Raises WeightsError that says what is wrong with the file.
    """
    if path.is_dir() or path.suffix == ".ckpt":
        raise WeightsError(
            f"{path} holds LaMa as it was trained, which only its own code reads: take {SCRIPT_FILE} or {ONNX_FILE}"
        )
    checksum = check(path)
    name = f"{path.stem}-{checksum[:8]}"
    engine = _onnx(path, name, threads) if path.suffix == ".onnx" else _script(path, name, placement, threads)
    return _tried(replace(engine, side_max=min(side_max, engine.square or side_max)), path)


def _script(path: Path, name: str, placement: Placement, threads: int) -> Lama:
    """Not yet tried. Switches off TorchScript's profiling in this process, which compiles anew for each size and keeps all."""
    require()
    import torch

    use_threads(threads)
    torch._C._jit_set_profiling_mode(False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter(
                "ignore", DeprecationWarning
            )  # of TorchScript as a whole: the file is published in no other form
            network = torch.jit.load(str(path), map_location=placement.device).eval()
    except Exception as error:  # the library's errors have no common parent
        raise WeightsError(f"{path} is no TorchScript file, as {SCRIPT_FILE} is one: {in_short(error)}") from error

    def paint(images: Floats, missing: Floats) -> Floats:
        with inference():
            answer = network(*(torch.from_numpy(values).to(placement.device) for values in (images, missing)))
            painted: Floats = answer.float().cpu().numpy()
            return painted

    batch_max = BATCH_MAX_CPU if placement.device == "cpu" else BATCH_MAX
    return Lama(paint, name, "torchscript", placement.device, batch_max=batch_max, network=network)


def _onnx(path: Path, name: str, threads: int) -> Lama:
    """Not yet tried. One crop at a time: more would be no quicker on a CPU, and some exports fail on them."""
    graph = ort.open_graph(path, threads)
    image, missing = _taken(graph, path)
    height, width = image.shape[2:]
    if height != width or missing.shape[2:] != image.shape[2:] or image.shape[0] not in (None, 1):
        raise WeightsError(
            f"{path} takes {image.shape} and {missing.shape}: neither one square of a fixed side nor one of any size"
        )
    outputs = [graph.outputs[0].name]

    def paint(images: Floats, own_missing: Floats) -> Floats:
        answer: Floats = graph.run(outputs, {image.name: images, missing.name: own_missing})[0]
        return answer

    return Lama(paint, name, "onnxruntime", square=height)


def _taken(graph: Graph, path: Path) -> tuple[Port, Port]:
    """The inputs for the image and for what is missing of it, told by their channels: exports name them as they like."""
    ports = {each.shape[1]: each for each in graph.inputs if len(each.shape) == 4 and each.dtype == "float32"}
    if len(graph.inputs) != 2 or set(ports) != {3, 1}:
        told = ", ".join(f"{each.name} {each.dtype} {each.shape}" for each in graph.inputs)
        raise WeightsError(f"{path} is no LaMa that takes an image and a mask: it takes {told}; take {ONNX_FILE}")
    return ports[3], ports[1]


def _tried(engine: Lama, file: Path) -> Lama:
    """The engine with its white, and no batches if the network cannot do them; refused if it answers with anything but pixels."""
    side = engine.square or TRIAL_SIDE
    images, missing = np.full((1, 3, side, side), 0.5, dtype=np.float32), np.zeros((1, 1, side, side), dtype=np.float32)
    hole = slice(side // 4, side // 2)
    images[..., hole, hole], missing[..., hole, hole] = 0, 1
    try:
        answer = engine.paint(images, missing)
    except MemoryError as error:
        raise WeightsError(f"{file} does not fit on {engine.device}: {error}") from error
    except DeviceLostError:
        raise
    except Exception as error:  # the libraries' errors have no common parent
        raise WeightsError(f"{file} fails on a grey image: {in_short(error)}") from error
    if answer.shape != images.shape:
        raise WeightsError(f"{file} answers to an image {images.shape} with {answer.shape}: it is no LaMa")
    if not np.isfinite(answer).all():
        raise WeightsError(f"{file} computes NaN or infinity: its weights are damaged")
    engine = replace(engine, white=255.0 if answer.max() > BRIGHTEST else 1.0)
    return engine if engine.batch_max == 1 or _takes_two(engine, images, missing, answer) else replace(engine, batch_max=1)


def _takes_two(engine: Lama, images: Floats, missing: Floats, alone: Floats) -> bool:
    """Whether two images at once give what one gives: some files were made for one only."""
    try:
        answer = engine.paint(np.repeat(images, 2, axis=0), np.repeat(missing, 2, axis=0))
    except DeviceLostError:
        raise
    except Exception:  # as above
        return False
    return answer.shape[0] == 2 and bool(np.allclose(answer, alone, rtol=0, atol=engine.white / 255))


def _padded(values: npt.NDArray[np.uint8], framed_hw: tuple[int, int]) -> npt.NDArray[np.uint8]:
    """Continued to the right and below by its mirror image, (h, w) or (h, w, 3)."""
    bottom, right = framed_hw[0] - values.shape[0], framed_hw[1] - values.shape[1]
    return cv2.copyMakeBorder(values, 0, bottom, 0, right, cv2.BORDER_REFLECT).astype(np.uint8, copy=False)
