"""MobileSAM on ONNX Runtime: an encoder that looks once, a decoder that answers clicks, boxes and masks.

Enters: an image, once; then prompts in its pixels. Leaves: masks at full resolution, enlarged inside their box only. What the
two files expect is read from them, so exports of others work too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models import amg, ort
from models.base import Embedding, EverythingOptions, ImageHWC, Mask, Prompt, Stop
from models.framing import Floats, Frame, fitted, masks_of
from models.weights import WeightsError, check

MEAN_RGB = np.array([123.675, 116.28, 103.53], dtype=np.float32)
STD_RGB = np.array([58.395, 57.12, 57.375], dtype=np.float32)
STRIDE = 16
"""Model pixels per pixel of the embedding."""
CELL = 4
"""Model pixels per pixel of a low-resolution mask."""
OBJECTS_MAX = 8
DECODER_INPUTS = ("image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size")
PER_OBJECT = ("point_coords", "point_labels", "mask_input", "has_mask_input")
ANSWERS = ("iou_predictions", "low_res_masks")
MASKS = 4
NO_POINT, BACKGROUND, FOREGROUND, UPPER_LEFT, LOWER_RIGHT = -1, 0, 1, 2, 3

Tokens = tuple[list[tuple[float, float]], list[int]]
"""Points of the image and what each is."""


@dataclass(frozen=True, slots=True)
class Contract:
    """What the two files expect: raw RGB of any height or a normalised square, `side` model pixels, and how many objects the
    decoder takes at once."""

    input_name: str
    raw: bool
    side: int
    objects_max: int

    @property
    def low_side(self) -> int:
        return self.side // CELL


@dataclass(frozen=True, slots=True, eq=False)
class MobileSam:
    """VisualSegmenter and EverythingSegmenter; safe on many threads at once. `load` makes one.

    `score` is the predicted IoU. The answer is the decoder's mask for unambiguous prompts, with `multimask` its three guesses.
    """

    encoder: Any
    decoder: Any
    contract: Contract
    model_id: str
    engine: str = "mobilesam"
    device: str = "cpu"

    def embed(self, image_hwc: ImageHWC) -> Embedding:
        """The encoder's output, float32 (1, 256, side / 16, side / 16), of uint8 RGB (height, width, 3)."""
        frame = self._frame((image_hwc.shape[0], image_hwc.shape[1]))
        given = _given(image_hwc, frame, self.contract)
        embedding: Floats = self.encoder.run(None, {self.contract.input_name: given})[0]
        embedding.flags.writeable = False
        return Embedding(frame.size_hw, embedding, embedding.nbytes)

    def segment(self, embedding: Embedding, prompts: Sequence[Prompt], multimask: bool | None, stop: Stop) -> list[list[Mask]]:
        """Per prompt one mask, or three when `multimask`, best first; None lets a lone point try three and keep the best.

        Prompts with as many points run together: a filler would be seen by the decoder and change the answer.
        """
        frame = self._frame(embedding.size_hw)
        asked = [_tokens(prompt) for prompt in prompts]
        answers: list[list[Mask]] = [[] for _ in prompts]
        for group in _groups([len(labels) for _, labels in asked], self.contract.objects_max):
            stop()
            masks = [prompts[index].mask for index in group]
            ious, logits = self._decode(embedding.data, [asked[index] for index in group], masks, frame)
            for index, own_ious, own_logits in zip(group, ious, logits, strict=True):
                chosen = _chosen(prompts[index], multimask)
                count = MASKS - 1 if multimask else 1
                answers[index] = masks_of(own_logits[chosen], frame, own_ious[chosen].tolist(), count)
        return answers

    def everything(self, embedding: Embedding, options: EverythingOptions, stop: Stop) -> list[Mask]:
        """The masks that a grid of single clicks finds, largest first."""
        frame = self._frame(embedding.size_hw)

        def clicks(points_xy: npt.NDArray[np.float64]) -> tuple[Floats, Floats]:
            asked: list[Tokens] = [([(float(x), float(y)), (0.0, 0.0)], [FOREGROUND, NO_POINT]) for x, y in points_xy]
            ious, logits = self._decode(embedding.data, asked, [None] * len(asked), frame)
            return logits[:, 1:], ious[:, 1:]

        return amg.everything(clicks, frame, options, self.contract.objects_max, stop)

    def _frame(self, size_hw: tuple[int, int]) -> Frame:
        return fitted(size_hw, self.contract.side, self.contract.low_side)

    def _decode(
        self, embedding: Floats, asked: Sequence[Tokens], masks: Sequence[Mask | None], frame: Frame
    ) -> tuple[Floats, Floats]:
        """Predicted IoU (n, 4) and logits (n, 4, low, low) of objects with as many points each."""
        low = self.contract.low_side
        points = np.stack([frame.points(points_xy) for points_xy, _ in asked])
        labels = np.array([labels for _, labels in asked], dtype=np.float32)
        points[labels == NO_POINT] = 0
        mask_input = np.zeros((len(asked), 1, low, low), dtype=np.float32)
        for index, mask in enumerate(masks):
            if mask is not None:
                mask_input[index, 0] = frame.mask_logits(mask)
        feeds = {
            "image_embeddings": embedding,
            "point_coords": points,
            "point_labels": labels,
            "mask_input": mask_input,
            "has_mask_input": np.array([mask is not None for mask in masks], dtype=np.float32),
            "orig_im_size": np.array([low, low], dtype=np.float32),  # the full-size output is not used: keep it small
        }
        ious, logits = self.decoder.run(ANSWERS, feeds)
        return ious, logits


def load(encoder: Path, decoder: Path, threads: int) -> MobileSam:
    """The engine made of two files, tried once on a grey image. Raises WeightsError that says what is wrong with which."""
    checksum = check(encoder)
    check(decoder)
    sessions = ort.open_session(encoder, threads), ort.open_session(decoder, threads)
    engine = MobileSam(*sessions, contract=_contract(*sessions, threads), model_id=f"mobile-sam-{checksum[:8]}")
    _try(engine, encoder, decoder)
    return engine


def _contract(encoder: Any, decoder: Any, threads: int) -> Contract:
    """What the graphs say of themselves."""
    lacking = [name for name in DECODER_INPUTS if name not in ort.names_of(decoder.get_inputs())]
    lacking += [name for name in ANSWERS if name not in ort.names_of(decoder.get_outputs())]
    if lacking:
        raise WeightsError(f"the decoder is not SAM's: it lacks {', '.join(lacking)}")
    if ort.shape_of(decoder, "iou_predictions")[1] == 1:
        raise WeightsError("the decoder gives one mask only: take sam_mask_decoder_multi.onnx")
    (image,) = encoder.get_inputs()
    rank = len(image.shape)
    channels = image.shape[2 if rank == 3 else 1] if rank in (3, 4) else None
    if rank not in (3, 4) or image.type != "tensor(float)" or (isinstance(channels, int) and channels != 3):
        raise WeightsError(
            f"the encoder takes {image.type} {image.shape}: neither raw (height, width, 3) nor a normalised square"
        )
    cells = ort.shape_of(decoder, "image_embeddings")[-1]
    if not isinstance(cells, int):
        raise WeightsError("the decoder does not say how large an embedding it takes")
    # On one core a second object costs more than the first, since the image no longer fits the cache.
    batched = all(isinstance(ort.shape_of(decoder, name)[0], str) for name in PER_OBJECT)
    together = min(threads, OBJECTS_MAX) if batched else 1
    return Contract(image.name, rank == 3, cells * STRIDE, together)


def _try(engine: MobileSam, encoder: Path, decoder: Path) -> None:
    """Refuse a network that answers with anything but numbers, before a user's photo does; it also warms both up."""
    side = engine.contract.side
    try:
        embedding = engine.embed(np.full((side // 2, side, 3), 127, dtype=np.uint8))
    except Exception as error:  # the library's errors have no common parent
        raise WeightsError(f"{encoder} fails on an image: {' '.join(str(error).split())[:200]}") from error
    if embedding.data.shape[2:] != (side // STRIDE, side // STRIDE):
        raise WeightsError(f"{encoder} and {decoder.name} do not belong together: {embedding.data.shape} is not what it takes")
    if not np.isfinite(embedding.data).all():
        raise WeightsError(f"{encoder} computes NaN or infinity: its weights are damaged")
    try:
        asked: list[Tokens] = [([(side / 2, side / 4), (0.0, 0.0)], [FOREGROUND, NO_POINT])]
        ious, logits = engine._decode(embedding.data, asked, [None], engine._frame(embedding.size_hw))
    except Exception as error:  # as above
        raise WeightsError(f"{decoder} fails on a click: {' '.join(str(error).split())[:200]}") from error
    if not (np.isfinite(ious).all() and np.isfinite(logits).all()):
        raise WeightsError(f"{decoder} computes NaN or infinity: its weights are damaged")
    low = engine.contract.low_side
    if ious.shape != (1, MASKS) or logits.shape != (1, MASKS, low, low):
        raise WeightsError(f"{decoder} answers in shapes {ious.shape} and {logits.shape}, not (1, {MASKS}) and its masks")


def _given(image_hwc: ImageHWC, frame: Frame, contract: Contract) -> Floats:
    """The image as the encoder takes it; resized as in segment-anything, by Pillow's bilinear filter."""
    height, width = frame.inner_hw
    resized = image_hwc if (height, width) == image_hwc.shape[:2] else _resized(image_hwc, (width, height))
    if contract.raw:
        return resized.astype(np.float32)
    square = np.zeros((1, 3, contract.side, contract.side), dtype=np.float32)
    square[0, :, :height, :width] = ((resized - MEAN_RGB) / STD_RGB).transpose(2, 0, 1)
    return square


def _resized(image_hwc: ImageHWC, size_wh: tuple[int, int]) -> ImageHWC:
    return np.asarray(Image.fromarray(image_hwc).resize(size_wh, Image.Resampling.BILINEAR))


def _tokens(prompt: Prompt) -> Tokens:
    """What the decoder is told: points, then the corners of the box, or one that is no point. A mask alone comes with its box."""
    points, labels = list(prompt.points_xy), list(prompt.labels)
    box_xyxy = prompt.box_xyxy
    if box_xyxy is None and not points and prompt.mask is not None:
        x0, y0, x1, y1 = prompt.mask.box_xyxy
        box_xyxy = float(x0), float(y0), float(x1), float(y1)
    if box_xyxy is None:
        return [*points, (0.0, 0.0)], [*labels, NO_POINT]
    return [*points, box_xyxy[:2], box_xyxy[2:]], [*labels, UPPER_LEFT, LOWER_RIGHT]


def _chosen(prompt: Prompt, multimask: bool | None) -> slice:
    """Which of the four masks count: a lone click is ambiguous, all else is not, unless the task says so."""
    lone = len(prompt.points_xy) == 1 and prompt.box_xyxy is None and prompt.mask is None
    return slice(1, MASKS) if multimask or (multimask is None and lone) else slice(0, 1)


def _groups(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Indexes of equal lengths, at most `most` together, in order of their first."""
    by_length: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        by_length.setdefault(length, []).append(index)
    for indexes in by_length.values():
        yield from (indexes[first : first + most] for first in range(0, len(indexes), most))
