"""An engine that looks at nothing: for tests and rehearsals of the daemon, chosen by its name only.

Enters: the same as for any engine. Leaves: the box itself, a disc around a point, a grid of squares, one colour where
something is to be painted; always the same, at once.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from models.base import (
    Canvas,
    ConceptQuestion,
    Embedding,
    EverythingOptions,
    Hole,
    ImageHWC,
    Later,
    Mask,
    Patch,
    Progress,
    Prompt,
    Stop,
    VisualQuestion,
    pack,
)

EMBEDDING_BYTES = 1024
DISC_SHARE = 0.1
SCORES = (0.9, 0.6, 0.3)
CONCEPT_SCORES = (0.9, 0.8, 0.7, 0.6)


@dataclass(frozen=True, slots=True)
class Mock:
    """Every role, with masks that depend on the image's size only and colours that depend on what is asked."""

    engine: str = "mock"
    model_id: str = "mock"
    device: str = "cpu"
    tokens_max: int = 32
    side: int = 512

    def shrink(self, image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> tuple[int, int]:
        """The image's size and nothing else."""
        return size_hw or (image_hwc.shape[0], image_hwc.shape[1])

    def embed(self, smalls: Sequence[tuple[int, int]]) -> list[Embedding]:
        """Sizes as embeddings."""
        return [Embedding(size_hw, None, EMBEDDING_BYTES) for size_hw in smalls]

    def segment(self, questions: Sequence[VisualQuestion], stop: Stop) -> list[Later]:
        """The prompt's mask, else its box, else a disc around its first foreground point; with `multimask` three of falling
        score."""
        stop()
        return [partial(_answer, question) for question in questions]

    def everything(self, embedding: Embedding, options: EverythingOptions, stop: Stop) -> Later:
        """Four squares, one in the middle of each quarter of the image, largest first."""
        stop()
        masks = [_scored(mask, SCORES[0]) for mask in _squares(embedding.size_hw)]
        large = [mask for mask in masks if mask.area >= max(options.min_mask_area, 1)]
        return lambda: sorted(large, key=lambda mask: -mask.area)[: options.points_per_side**2]

    def tokens(self, text: str) -> int:
        """Words, and both ends."""
        return len(text.split()) + 2

    def find(self, questions: Sequence[ConceptQuestion], stop: Stop) -> list[Later]:
        """As many squares as the text has letters, but at most four, of falling score."""
        stop()
        return [partial(_instances, question) for question in questions]

    def inpaint(self, holes: Sequence[Hole], stop: Stop) -> list[list[Patch]]:
        """The box of each mask in its own mean colour."""
        stop()
        return [[_flat(hole)] if hole.mask.area else [] for hole in holes]

    def generate(self, pictures: Sequence[Canvas], stop: Stop, progress: Progress) -> list[ImageHWC]:
        """Each picture with a colour under its mask that prompt and seed give; as many stops as the longest has steps."""
        steps = max((picture.steps for picture in pictures), default=0)
        for step in range(steps):
            stop()
            progress((step + 1) / steps)
        return [np.where(picture.mask_hw[..., None], _colour(picture), picture.image_hwc) for picture in pictures]


def _answer(question: VisualQuestion) -> list[Mask]:
    mask = _shape(question.prompt, question.embedding.size_hw)
    return [_scored(mask, score) for score in (SCORES if question.multimask else SCORES[:1])]


def _instances(question: ConceptQuestion) -> list[Mask]:
    squares = _squares(question.embedding.size_hw)[: len(question.prompt.text or "such")]
    scored = zip(squares, CONCEPT_SCORES, strict=False)
    found = [replace(mask, score=score, label=question.prompt.text) for mask, score in scored if score >= question.threshold]
    return found[: question.max_instances]


def _flat(hole: Hole) -> Patch:
    x0, y0, x1, y1 = hole.mask.box_xyxy
    mean = hole.image_hwc[y0:y1, x0:x1].mean(axis=(0, 1)).round().astype(np.uint8)
    return Patch(hole.mask.box_xyxy, np.tile(mean, (y1 - y0, x1 - x0, 1)))


def _colour(picture: Canvas) -> ImageHWC:
    checksum = zlib.crc32(f"{picture.seed} {picture.prompt}".encode())
    return np.frombuffer(checksum.to_bytes(4, "big"), dtype=np.uint8)[:3]


def _squares(size_hw: tuple[int, int]) -> list[Mask]:
    height, width = size_hw
    side = max(min(height, width) // 4, 1)
    centres = [(width * x // 4, height * y // 4) for y in (1, 3) for x in (1, 3)]
    return [_box((x, y, x + side, y + side), size_hw) for x, y in centres]


def _scored(mask: Mask, score: float) -> Mask:
    return replace(mask, score=score, predicted_iou=score, stability_score=score)


def _shape(prompt: Prompt, size_hw: tuple[int, int]) -> Mask:
    if prompt.mask is not None:
        return prompt.mask
    if prompt.box_xyxy is not None:
        x0, y0, x1, y1 = prompt.box_xyxy
        return _box((int(x0), int(y0), max(round(x1), int(x0) + 1), max(round(y1), int(y0) + 1)), size_hw)
    points = zip(prompt.points_xy, prompt.labels, strict=True)
    x, y = next(point for point, label in points if label == 1)
    return _disc(int(x), int(y), size_hw)


def _box(box_xyxy: tuple[int, int, int, int], size_hw: tuple[int, int]) -> Mask:
    x0, y0, x1, y1 = box_xyxy
    return pack(np.ones((min(y1, size_hw[0]) - y0, min(x1, size_hw[1]) - x0), dtype=np.bool_), (x0, y0))


def _disc(x: int, y: int, size_hw: tuple[int, int]) -> Mask:
    radius = max(DISC_SHARE * min(size_hw), 1.0)
    reach = int(radius) + 1
    x0, y0 = max(x - reach, 0), max(y - reach, 0)
    x1, y1 = min(x + reach + 1, size_hw[1]), min(y + reach + 1, size_hw[0])
    ys, xs = np.ogrid[y0:y1, x0:x1]
    return pack((xs - x) ** 2 + (ys - y) ** 2 <= radius**2, (x0, y0))
