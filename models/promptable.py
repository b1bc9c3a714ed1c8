"""Clicks, boxes and masks on an image's feature maps, for every network that has the prompt encoder and mask decoder of SAM 2.

Enters: maps on the device and prompts in pixels of the image. Leaves: masks that wait, as logits on the CPU, to be enlarged. The
network's own forward is passed by: it copies the maps once per object, and takes one mask prompt a call.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from models import amg
from models.base import EverythingOptions, Later, Mask, Prompt, Stop, VisualQuestion
from models.framing import Floats, Frame, masks_of
from models.masks import BoxXYXY
from models.torch_device import Placement, inference

Tensor = Any
Maps = Sequence[Tensor]
"""What a network sees in one image: three feature maps (1, channels, height, width), fine to coarse."""

FLOAT32_PARTS = ("prompt_encoder", "shared_image_embedding")
BACKGROUND, FOREGROUND, UPPER_LEFT, LOWER_RIGHT = 0, 1, 2, 3
MULTIMASKS = 3


@dataclass(frozen=True, slots=True)
class Told:
    """One object as the network is told of it: points of the image and what each is, and the mask of an earlier round."""

    points_xy: tuple[tuple[float, float], ...]
    labels: tuple[int, ...]
    mask: Mask | None = None


@dataclass(frozen=True, slots=True)
class Way:
    """What objects of one pass have in common: how many points, how many masks are tried, and how many of them returned."""

    points: int
    tried: int
    returned: int


class Promptable:
    """Clicks, boxes and masks on feature maps, by a network with the interface of transformers' Sam2Model.

    Images fill the square of `side` model pixels, stretched; masks have `low_side` cells a side. At most `objects_max` objects
    are answered in one pass. Holds no state of a call: safe on many threads at once.
    """

    def __init__(self, network: Any, side: int, low_side: int, placement: Placement, objects_max: int = 64) -> None:
        self.network = network
        self.side = side
        self.low_side = low_side
        self.placement = placement
        self.objects_max = objects_max
        with inference():
            self._places = network.get_image_wide_positional_embeddings().to(placement.dtype)

    def segment(
        self,
        maps: Sequence[Maps],
        sizes_hw: Sequence[tuple[int, int]],
        questions: Sequence[VisualQuestion],
        stop: Stop,
    ) -> list[Later]:
        """Per question one mask, or three, best first; its score is the predicted IoU. `stop()` is called before each pass.

        `maps[i]` belongs to the image of question i, of size `sizes_hw[i]`: the same object where the image is the same. Only
        questions with as many points run together: a filler would be seen by the decoder and change the answer.
        """
        answers: list[Later] = [list] * len(questions)
        told = [_told(question.prompt) for question in questions]
        ways = [_way(question, len(each.labels)) for question, each in zip(questions, told, strict=True)]
        for way, group in _groups(ways, self.objects_max):
            stop()
            frames = [self._frame(sizes_hw[index]) for index in group]
            with inference():
                logits, ious = self._decode([maps[i] for i in group], frames, [told[i] for i in group], way.tried)
                logits_nmhw, ious_nm = _best(logits, ious) if way.returned < way.tried else (_on_cpu(logits), _on_cpu(ious))
            for index, frame, logits_mhw, ious_m in zip(group, frames, logits_nmhw, ious_nm, strict=True):
                answers[index] = partial(masks_of, logits_mhw, frame, ious_m.tolist(), way.returned)
        return answers

    def everything(
        self,
        maps: Maps,
        size_hw: tuple[int, int],
        options: EverythingOptions,
        stop: Stop,
        crops: Iterable[tuple[BoxXYXY, Maps]] = (),
    ) -> Later:
        """The masks that a grid of single clicks finds, largest first; the same grid in each of `crops`, boxes of the image with
        maps of their own, which are taken one after the other."""
        parts = itertools.chain([((0, 0, size_hw[1], size_hw[0]), maps)], crops)
        looks = (self._look(box_xyxy, own, options) for box_xyxy, own in parts)
        return amg.everywhere(looks, size_hw, options, self.objects_max, stop)

    def click(self, maps: Maps, size_hw: tuple[int, int], point_xy: tuple[float, float]) -> tuple[Floats, Floats]:
        """The bare answer to one click, to try a network: logits (3, low_side, low_side) and predicted IoU (3,)."""
        told = Told((point_xy,), (FOREGROUND,))
        with inference():
            logits, ious = self._decode([maps], [self._frame(size_hw)], [told], MULTIMASKS)
            return _on_cpu(logits[0]), _on_cpu(ious[0])

    def _frame(self, size_hw: tuple[int, int]) -> Frame:
        return Frame(size_hw, (self.side, self.side), self.side, self.low_side)

    def _look(self, box_xyxy: BoxXYXY, maps: Maps, options: EverythingOptions) -> tuple[amg.Window, amg.Clicks]:
        """A window on the image, and who answers clicks in it: with what passes the thresholds only, found on the device."""
        x0, y0, x1, y1 = box_xyxy
        frame = self._frame((y1 - y0, x1 - x0))

        def clicks(points_xy: npt.NDArray[np.float64]) -> tuple[Floats, Floats]:
            told = [Told(((float(x), float(y)),), (FOREGROUND,)) for x, y in points_xy]
            with inference():
                logits, ious = self._decode([maps] * len(told), [frame] * len(told), told, MULTIMASKS)
                logits, ious = _passing(logits, ious, options)
                return _on_cpu(logits)[:, None], _on_cpu(ious)[:, None]

        return amg.Window(frame, (x0, y0)), clicks

    def _decode(self, maps: Sequence[Maps], frames: Sequence[Frame], told: Sequence[Told], tried: int) -> tuple[Tensor, Tensor]:
        """Logits (n, tried, low_side, low_side) and predicted IoU (n, tried) of n objects with as many points each, on the
        device. Where one is tried and it is unstable, the network itself takes the best of three."""
        points = np.stack([frame.points(each.points_xy) for frame, each in zip(frames, told, strict=True)])
        labels = np.array([each.labels for each in told], dtype=np.int64)
        encoder = self.network.prompt_encoder
        sparse, dense = encoder(self._tensor(points[:, None]), self._tensor(labels[:, None]), None, None)
        masks = [(index, frames[index].mask_logits(each.mask)) for index, each in enumerate(told) if each.mask is not None]
        if masks:
            logits = self._tensor(np.stack([logits_hw for _, logits_hw in masks])[:, None])
            dense = dense.clone()
            dense[[index for index, _ in masks]] = encoder.mask_embed(logits)
        fine, middle, coarse = _together(maps)
        dtype = self.placement.dtype
        logits, ious, *_ = self.network.mask_decoder(
            image_embeddings=coarse.expand(len(told), -1, -1, -1),
            image_positional_embeddings=self._places,
            sparse_prompt_embeddings=sparse.to(dtype),
            dense_prompt_embeddings=dense.to(dtype),
            multimask_output=tried > 1,
            high_resolution_features=[fine, middle],
        )
        return logits[:, 0], ious[:, 0].float()

    def _tensor(self, values: npt.NDArray[Any]) -> Tensor:
        import torch

        return torch.from_numpy(values).to(self.placement.device)


def placed(network: Any, placement: Placement) -> Any:
    """The network on its device and in its precision. What reads prompts stays float32: in bfloat16 a click would be off by most
    of a model pixel, and the library's own rescue, a cast to float32, is without effect."""
    network.to(placement.device).eval().requires_grad_(False)
    for name, part in network.named_children():
        if name not in FLOAT32_PARTS:
            part.to(placement.dtype)
    for own in network.parameters(recurse=False):
        own.data = own.data.to(placement.dtype)
    return network


def _told(prompt: Prompt) -> Told:
    """The points, then the corners of the box. A mask alone comes with its box; an empty one is none."""
    mask = prompt.mask if prompt.mask is not None and prompt.mask.bits.size else None
    box_xyxy = prompt.box_xyxy
    if box_xyxy is None and not prompt.points_xy and mask is not None:
        x0, y0, x1, y1 = mask.box_xyxy
        box_xyxy = float(x0), float(y0), float(x1), float(y1)
    if box_xyxy is None:
        return Told(prompt.points_xy, prompt.labels, mask)
    corners = box_xyxy[:2], box_xyxy[2:]
    return Told((*prompt.points_xy, *corners), (*prompt.labels, UPPER_LEFT, LOWER_RIGHT), mask)


def _way(question: VisualQuestion, points: int) -> Way:
    """A lone click is ambiguous, all else is not, unless the question says so."""
    if question.multimask:
        return Way(points, MULTIMASKS, MULTIMASKS)
    prompt = question.prompt
    lone = len(prompt.points_xy) == 1 and prompt.box_xyxy is None and prompt.mask is None
    return Way(points, MULTIMASKS if question.multimask is None and lone else 1, 1)


def _groups(ways: Sequence[Way], most: int) -> Iterator[tuple[Way, list[int]]]:
    """Indexes of what goes the same way, at most `most` together, in order of their first."""
    by_way: dict[Way, list[int]] = {}
    for index, way in enumerate(ways):
        by_way.setdefault(way, []).append(index)
    for way, indexes in by_way.items():
        yield from ((way, indexes[first : first + most]) for first in range(0, len(indexes), most))


def _together(maps: Sequence[Maps]) -> list[Tensor]:
    """The maps of every object, (n, ...) each, or (1, ...) where all look at the same image: that spares a copy per object."""
    import torch

    if all(each is maps[0] for each in maps):
        return list(maps[0])
    return [torch.cat(level) for level in zip(*maps, strict=True)]


def _passing(logits: Tensor, ious: Tensor, options: EverythingOptions) -> tuple[Tensor, Tensor]:
    """Of logits (n, m, h, w) and predicted IoU (n, m) what passes both thresholds, (k, h, w) and (k,): as `amg` decides, but on
    the device, so that little is copied."""
    likely = ious >= options.pred_iou_thresh
    logits, ious = logits[likely], ious[likely]
    narrow, wide = ((logits > offset).sum((1, 2)) for offset in (amg.STABILITY_OFFSET, -amg.STABILITY_OFFSET))
    stable = narrow.double() / wide.clamp(min=1) >= options.stability_score_thresh
    return logits[stable], ious[stable]


def _best(logits: Tensor, ious: Tensor) -> tuple[Floats, Floats]:
    """Of logits (n, m, h, w) and predicted IoU (n, m) each object's best, (n, 1, h, w) and (n, 1), on the CPU."""
    import torch

    best = ious.argmax(dim=1)
    rows = torch.arange(len(best), device=best.device)
    return _on_cpu(logits[rows, best])[:, None], _on_cpu(ious[rows, best])[:, None]


def _on_cpu(values: Tensor) -> Floats:
    """Copied in the device's precision, then float32."""
    found: Floats = values.cpu().float().numpy()
    return found
