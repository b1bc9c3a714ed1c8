"""SAM 2 and 2.1 on torch: an image is looked at once, then clicks, boxes and masks are answered, or everything is looked for.

Enters: a folder as the hub keeps it, of the image model or of the video model whose image part is used. Leaves: masks by
`models.promptable`. Imports torch and transformers only when a network is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from models.amg import crop_boxes
from models.base import DeviceLostError, Embedding, EverythingOptions, ImageHWC, Later, Stop, VisualQuestion
from models.masks import BoxXYXY
from models.promptable import Maps, Promptable, placed
from models.torch_device import Placement, details, inference, require
from models.weights import WeightsError, check

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
KINDS = ("sam2", "sam2_video")
"""What `model_type` in config.json may say."""
MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)
BUCKETS = (1, 2, 4, 8)
"""How many images one pass takes. A compiled network is given no other count, since each costs a compilation."""
OBJECTS_MAX, OBJECTS_MAX_CPU = 64, 8


@dataclass(frozen=True, slots=True)
class Small:
    """An image of `size_hw` stretched to the model's square, uint8 (side, side, 3), and so each of its crops."""

    size_hw: tuple[int, int]
    square_hwc: ImageHWC
    crops_hwc: tuple[ImageHWC, ...] = ()


@dataclass(frozen=True, slots=True)
class Seen:
    """The feature maps of an image on the device, and its crops, still to be looked at should everything be asked for."""

    maps: Maps
    crops_hwc: tuple[ImageHWC, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Sam2:
    """VisualSegmenter and EverythingSegmenter; safe on many threads at once. `load` makes one.

    `score` is the predicted IoU. `crop_layers` is how many layers of crops are kept of each image for everything mode.
    """

    encode: Callable[[Any], Sequence[Any]]
    promptable: Promptable
    placement: Placement
    model_id: str
    crop_layers: int = 0
    engine: str = "sam2"

    @property
    def device(self) -> str:
        """Where the network lives, as torch names it."""
        return self.placement.device

    @property
    def network(self) -> Any:
        """Everything that takes memory on the device."""
        return self.promptable.network

    def details(self) -> dict[str, Any]:
        """Precision and size, for the log and /health."""
        return details(self.network, self.placement)

    def shrink(self, image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> Small:
        """The image, uint8 RGB (height, width, 3), and its crops in the model's square: stretched by Pillow's bilinear filter."""
        given_hw = image_hwc.shape[0], image_hwc.shape[1]
        size_hw = size_hw or given_hw
        boxes = [_scaled(box_xyxy, size_hw, given_hw) for box_xyxy in crop_boxes(size_hw, self.crop_layers)]
        crops = [image_hwc[y0:y1, x0:x1] for x0, y0, x1, y1 in boxes]
        side = self.promptable.side
        return Small(size_hw, _stretched(image_hwc, side), tuple(_stretched(crop_hwc, side) for crop_hwc in crops))

    def embed(self, smalls: Sequence[Small]) -> list[Embedding]:
        """Three feature maps per image on the device, in the network's precision; several images in one pass."""
        maps = self._look([small.square_hwc for small in smalls])
        return [_embedding(small, own) for small, own in zip(smalls, maps, strict=True)]

    def segment(self, questions: Sequence[VisualQuestion], stop: Stop) -> list[Later]:
        """Per question one mask, or three with `multimask`, best first; None lets a lone point try three and keep the best."""
        embeddings = [question.embedding for question in questions]
        maps = [embedding.data.maps for embedding in embeddings]
        return self.promptable.segment(maps, [embedding.size_hw for embedding in embeddings], questions, stop)

    def everything(self, embedding: Embedding, options: EverythingOptions, stop: Stop) -> Later:
        """The masks that a grid of single clicks finds in the image and in as many layers of crops as are asked for and kept."""
        layers = self.crop_layers if options.crop_layers is None else min(options.crop_layers, self.crop_layers)
        boxes = crop_boxes(embedding.size_hw, layers)
        crops = self._crops(boxes, embedding.data.crops_hwc[: len(boxes)], stop)
        return self.promptable.everything(embedding.data.maps, embedding.size_hw, options, stop, crops)

    def warm_up(self) -> None:
        """Look at grey images once in every count that will come, so that compiling is over before the first photo."""
        grey_hwc = _grey(self.promptable.side)
        for count in BUCKETS if self.placement.compiled else BUCKETS[:1]:
            self.embed([self.shrink(grey_hwc)] * count)

    def _crops(self, boxes_xyxy: Sequence[BoxXYXY], crops_hwc: Sequence[ImageHWC], stop: Stop) -> Iterator[tuple[BoxXYXY, Maps]]:
        """Each crop with its maps, looked at some together and only when their turn comes."""
        for first in range(0, len(boxes_xyxy), BUCKETS[-1]):
            stop()
            own = slice(first, first + BUCKETS[-1])
            yield from zip(boxes_xyxy[own], self._look(crops_hwc[own]), strict=True)

    def _look(self, squares_hwc: Sequence[ImageHWC]) -> list[Maps]:
        """The maps of each square, in as few passes as there may be; each owns its memory."""
        found: list[Maps] = []
        for first in range(0, len(squares_hwc), BUCKETS[-1]):
            group = list(squares_hwc[first : first + BUCKETS[-1]])
            count = len(group)
            if self.placement.compiled:
                group += [group[-1]] * (next(bucket for bucket in BUCKETS if bucket >= count) - count)
            with inference():
                levels = self.encode(_normalised(np.stack(group), self.placement))
                found += [tuple(level[index : index + 1].clone() for level in levels) for index in range(count)]
        return found


def load(path: Path, placement: Placement, crop_layers: int = 0) -> Sam2:
    """The engine made of a folder with config.json and model.safetensors, tried once on a grey image.

    Raises WeightsError that says what is wrong with which file.
    """
    require()
    checksum = check(path / WEIGHTS_FILE)
    with inference():
        network = placed(_network(path), placement)
    prompts = network.prompt_encoder
    objects_max = OBJECTS_MAX_CPU if placement.device == "cpu" else OBJECTS_MAX
    promptable = Promptable(network, prompts.input_image_size, prompts.mask_input_size[0], placement, objects_max)
    encode = network.get_image_embeddings
    if placement.compiled:
        import torch

        encode = torch.compile(encode, dynamic=False)
    engine = Sam2(encode, promptable, placement, f"{path.name}-{checksum[:8]}", crop_layers)
    _try(engine, path / WEIGHTS_FILE)
    return engine


def _network(path: Path) -> Any:
    """The network with all its weights, float32 on the CPU; those of the video model's memory are left out."""
    import torch
    from transformers import Sam2Config, Sam2Model
    from transformers.utils import logging

    described = _described(path / CONFIG_FILE)
    file = path / WEIGHTS_FILE
    logging.disable_progress_bar()
    try:
        config = Sam2Config.from_dict({**described, "model_type": KINDS[0]})
        network, report = Sam2Model.from_pretrained(
            path, config=config, dtype=torch.float32, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # the libraries' errors have no common parent
        raise WeightsError(f"{file} cannot be loaded as {CONFIG_FILE} describes it: {_words(error)}") from error
    if missing := sorted(report["missing_keys"]):
        raise WeightsError(f"{file} lacks {len(missing)} weights of SAM 2, among them {missing[0]}")
    return network


def _described(file: Path) -> dict[str, Any]:
    """What config.json says, if it is that of a SAM 2."""
    try:
        described = json.loads(file.read_text(encoding="utf-8"))
        kind = described["model_type"]
    except FileNotFoundError:
        raise WeightsError(f"{file} is missing") from None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{file} cannot be read as the description of a network: {_words(error)}") from error
    if kind not in KINDS:
        raise WeightsError(f"{file} describes a network of type {kind}, not {' or '.join(KINDS)}")
    return dict(described)


def _try(engine: Sam2, file: Path) -> None:
    """Refuse a network that answers with anything but numbers, before a user's photo does."""
    promptable = engine.promptable
    side = promptable.side
    try:
        [embedding] = engine.embed([engine.shrink(_grey(side))])
        seen: Seen = embedding.data
        finite = [bool(level.isfinite().all()) for level in seen.maps]
        logits, ious = promptable.click(seen.maps, embedding.size_hw, (side / 2, side / 4))
    except (MemoryError, DeviceLostError):
        raise
    except Exception as error:  # as above
        raise WeightsError(f"{file} fails on a grey image: {_words(error)}") from error
    if not (all(finite) and np.isfinite(logits).all() and np.isfinite(ious).all()):
        raise WeightsError(f"{file} computes NaN or infinity: its weights are damaged")


def _embedding(small: Small, maps: Maps) -> Embedding:
    nbytes = sum(level.nbytes for level in maps) + sum(crop_hwc.nbytes for crop_hwc in small.crops_hwc)
    return Embedding(small.size_hw, Seen(maps, small.crops_hwc), nbytes)


def _scaled(box_xyxy: BoxXYXY, from_hw: tuple[int, int], to_hw: tuple[int, int]) -> BoxXYXY:
    """The same part of a copy of another size, at least a pixel."""
    (from_h, from_w), (to_h, to_w) = from_hw, to_hw
    x0, y0 = min(box_xyxy[0] * to_w // from_w, to_w - 1), min(box_xyxy[1] * to_h // from_h, to_h - 1)
    return x0, y0, max(round(box_xyxy[2] * to_w / from_w), x0 + 1), max(round(box_xyxy[3] * to_h / from_h), y0 + 1)


def _stretched(image_hwc: ImageHWC, side: int) -> ImageHWC:
    return np.asarray(Image.fromarray(image_hwc).resize((side, side), Image.Resampling.BILINEAR))


def _grey(side: int) -> ImageHWC:
    return np.full((side // 2, side, 3), 127, dtype=np.uint8)


def _normalised(squares_nhwc: ImageHWC, placement: Placement) -> Any:
    """Copied as small integers, then (n, 3, side, side) in the network's precision, of mean 0 and deviation 1."""
    import torch

    mean, std = (torch.tensor(values, device=placement.device).view(3, 1, 1) for values in (MEAN_RGB, STD_RGB))
    pixels = torch.from_numpy(squares_nhwc).to(placement.device).permute(0, 3, 1, 2)
    return ((pixels - mean) / std).to(placement.dtype)


def _words(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
