"""MobileSAM on CPU: an encoder that looks once, on the fastest runtime there is, a decoder that answers clicks, boxes and masks.

Enters: an image, once; then prompts in its pixels. Leaves: masks at full resolution, enlarged inside their box only. What the
two files expect is read from them, so exports of others work too.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from models import amg, cpu_choice, ort
from models.base import Embedding, EverythingOptions, ImageHWC, Later, Mask, Prompt, Stop, VisualQuestion
from models.cpu_choice import AUTO, EXACT, Subject
from models.framing import Floats, Frame, fitted, masks_of
from models.graph import Arrays, Graph, in_short, names, port
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

Small = tuple[tuple[int, int], ImageHWC]
"""Height and width of an image, and its pixels at the model's side."""
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
    `runtime` computes the encoder, ONNX Runtime the decoder; `measured_ms` says why, if there was a choice.
    """

    encoder: Graph
    decoder: Graph
    contract: Contract
    model_id: str
    runtime: str = EXACT
    measured_ms: dict[str, float] = field(default_factory=dict)
    engine: str = "mobilesam"
    device: str = "cpu"

    def details(self) -> dict[str, Any]:
        """What /health tells besides: the encoder's runtime, and milliseconds by runtime if several were tried."""
        return {"runtime": self.runtime, **({"measured_ms": self.measured_ms} if self.measured_ms else {})}

    def shrink(self, image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> Small:
        """The image at the model's side, and its own size; resized as in segment-anything, by Pillow's bilinear filter."""
        given_hw = image_hwc.shape[0], image_hwc.shape[1]
        height, width = self._frame(size_hw or given_hw).inner_hw
        return size_hw or given_hw, image_hwc if (height, width) == given_hw else _resized(image_hwc, (width, height))

    def embed(self, smalls: Sequence[Small]) -> list[Embedding]:
        """The encoder's output, float32 (1, 256, side / 16, side / 16), one image after the other."""
        return [self._embedding(*small) for small in smalls]

    def segment(self, questions: Sequence[VisualQuestion], stop: Stop) -> list[Later]:
        """Per question one mask, or three when `multimask`, best first; None lets a lone point try three and keep the best.

        Prompts of one image with as many points run together: a filler would be seen by the decoder and change the answer.
        """
        asked = [_tokens(question.prompt) for question in questions]
        answers: list[Later] = [list] * len(questions)
        alike = [(id(question.embedding), len(labels)) for question, (_, labels) in zip(questions, asked, strict=True)]
        for group in _groups(alike, self.contract.objects_max):
            stop()
            embedding = questions[group[0]].embedding
            frame = self._frame(embedding.size_hw)
            masks = [questions[index].prompt.mask for index in group]
            ious, logits = self._decode(embedding.data, [asked[index] for index in group], masks, frame)
            for index, own_ious, own_logits in zip(group, ious, logits, strict=True):
                multimask = questions[index].multimask
                chosen = _chosen(questions[index].prompt, multimask)
                count = MASKS - 1 if multimask else 1
                answers[index] = partial(masks_of, own_logits[chosen], frame, own_ious[chosen].tolist(), count)
        return answers

    def everything(self, embedding: Embedding, options: EverythingOptions, stop: Stop) -> Later:
        """The masks that a grid of single clicks finds, largest first."""
        frame = self._frame(embedding.size_hw)

        def clicks(points_xy: npt.NDArray[np.float64]) -> tuple[Floats, Floats]:
            asked: list[Tokens] = [([(float(x), float(y)), (0.0, 0.0)], [FOREGROUND, NO_POINT]) for x, y in points_xy]
            ious, logits = self._decode(embedding.data, asked, [None] * len(asked), frame)
            return logits[:, 1:], ious[:, 1:]

        return amg.everything(clicks, frame, options, self.contract.objects_max, stop)

    def _embedding(self, size_hw: tuple[int, int], small_hwc: ImageHWC) -> Embedding:
        given = _given(small_hwc, self.contract)
        embedding: Floats = self.encoder.run(None, {self.contract.input_name: given})[0]
        embedding.flags.writeable = False
        return Embedding(size_hw, embedding, embedding.nbytes)

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


def load(encoder: Path, decoder: Path, threads: int, runtime: str = AUTO, memory: Path | None = None) -> MobileSam:
    """The engine made of two files, tried once on a grey image. Raises WeightsError that says what is wrong with which.

    `runtime` and `memory` are those of `models.cpu_choice.choose`.
    """
    checksum = check(encoder)
    check(decoder)
    answering = ort.open_graph(decoder, threads)
    choice = cpu_choice.choose(Subject(encoder, checksum, threads, partial(_sample, answering)), runtime, memory)
    engine = MobileSam(
        choice.graph,
        answering,
        contract=_contract(choice.graph, answering, threads),
        model_id=f"mobile-sam-{checksum[:8]}",
        runtime=choice.runtime,
        measured_ms=choice.measured_ms,
    )
    _try(engine, encoder, decoder)
    return engine


def _contract(encoder: Graph, decoder: Graph, threads: int) -> Contract:
    """What the graphs say of themselves."""
    lacking = [name for name in DECODER_INPUTS if name not in names(decoder.inputs)]
    lacking += [name for name in ANSWERS if name not in names(decoder.outputs)]
    if lacking:
        raise WeightsError(f"the decoder is not SAM's: it lacks {', '.join(lacking)}")
    if port(decoder, "iou_predictions").shape[1] == 1:
        raise WeightsError("the decoder gives one mask only: take sam_mask_decoder_multi.onnx")
    (image,) = encoder.inputs
    rank = len(image.shape)
    channels = image.shape[2 if rank == 3 else 1] if rank in (3, 4) else None
    if rank not in (3, 4) or image.dtype != "float32" or channels not in (None, 3):
        raise WeightsError(
            f"the encoder takes {image.dtype} {image.shape}: neither raw (height, width, 3) nor a normalised square"
        )
    cells = port(decoder, "image_embeddings").shape[-1]
    if cells is None:
        raise WeightsError("the decoder does not say how large an embedding it takes")
    # On one core a second object costs more than the first, since the image no longer fits the cache.
    batched = all(port(decoder, name).shape[0] is None for name in PER_OBJECT)
    together = min(threads, OBJECTS_MAX) if batched else 1
    return Contract(image.name, rank == 3, cells * STRIDE, together)


def _sample(decoder: Graph, encoder: Graph) -> Arrays:
    """What runtimes are compared on: a picture of smooth and rough parts, three quarters as high as wide."""
    contract = _contract(encoder, decoder, threads=1)
    height, width = contract.side * 3 // 4, contract.side
    y, x = np.mgrid[:height, :width] / width
    waves_hwc = np.stack([x, y, 0.5 + 0.5 * np.sin(40 * x * y)], axis=-1) * 200
    noise_hwc = np.random.default_rng(0).integers(0, 55, (height, width, 3)) * (x > y)[..., None]
    return {contract.input_name: _given((waves_hwc + noise_hwc).astype(np.uint8), contract)}


def _try(engine: MobileSam, encoder: Path, decoder: Path) -> None:
    """Refuse a network that answers with anything but numbers, before a user's photo does; it also warms both up."""
    side = engine.contract.side
    try:
        (embedding,) = engine.embed([engine.shrink(np.full((side // 2, side, 3), 127, dtype=np.uint8))])
    except Exception as error:  # the library's errors have no common parent
        raise WeightsError(f"{encoder} fails on an image: {in_short(error)}") from error
    if embedding.data.shape[2:] != (side // STRIDE, side // STRIDE):
        raise WeightsError(f"{encoder} and {decoder.name} do not belong together: {embedding.data.shape} is not what it takes")
    if not np.isfinite(embedding.data).all():
        raise WeightsError(f"{encoder} computes NaN or infinity: its weights are damaged")
    try:
        asked: list[Tokens] = [([(side / 2, side / 4), (0.0, 0.0)], [FOREGROUND, NO_POINT])]
        ious, logits = engine._decode(embedding.data, asked, [None], engine._frame(embedding.size_hw))
    except Exception as error:  # as above
        raise WeightsError(f"{decoder} fails on a click: {in_short(error)}") from error
    if not (np.isfinite(ious).all() and np.isfinite(logits).all()):
        raise WeightsError(f"{decoder} computes NaN or infinity: its weights are damaged")
    low = engine.contract.low_side
    if ious.shape != (1, MASKS) or logits.shape != (1, MASKS, low, low):
        raise WeightsError(f"{decoder} answers in shapes {ious.shape} and {logits.shape}, not (1, {MASKS}) and its masks")


def _given(small_hwc: ImageHWC, contract: Contract) -> Floats:
    """The pixels as the encoder takes them."""
    if contract.raw:
        return small_hwc.astype(np.float32)
    height, width = small_hwc.shape[:2]
    square = np.zeros((1, 3, contract.side, contract.side), dtype=np.float32)
    square[0, :, :height, :width] = ((small_hwc - MEAN_RGB) / STD_RGB).transpose(2, 0, 1)
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


def _groups(alike: Sequence[Hashable], most: int) -> Iterator[list[int]]:
    """Indexes of what is alike, at most `most` together, in order of their first."""
    together: dict[Hashable, list[int]] = {}
    for index, key in enumerate(alike):
        together.setdefault(key, []).append(index)
    for indexes in together.values():
        yield from (indexes[first : first + most] for first in range(0, len(indexes), most))
