"""What a segmenting kind found, and the short list and facts about it that stand in the row.

Enters: masks with their object and label. Leaves: `labels` and `metadata`; `_png` and `_coco` write the files from the same list.
"""

from __future__ import annotations

import colorsys
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count as count_from
from typing import Any

from handlers._coco import dataset
from handlers._png import mask_png
from handlers.base import Job, Result, ResultBlob
from models.base import Mask, Model

LABELS_BYTES_MAX = 64_000
"""Of the list as JSON text; the row takes 64 KB."""


@dataclass(frozen=True, slots=True)
class Instance:
    """One mask of a result. Its id is its place in the list, from 1; those that are drawn come first.

    `object` is the index of what asked for it in `objects`, None where nothing did.
    """

    mask: Mask
    label: str
    object: int | None = None
    drawn: bool = True


@dataclass(frozen=True, slots=True)
class Facts:
    """Which model answered, and whether it already knew the image."""

    engine: str
    model_id: str
    device: str
    embedding_cached: bool


def facts_of(model: Model, embedding_cached: bool) -> Facts:
    """The facts of an answer by `model`."""
    return Facts(model.engine, model.model_id, model.device, embedding_cached)


def colours(count: int) -> list[tuple[int, int, int]]:
    """RGB of ids 1..count: unique, never black, always the same for the same id; hues a golden angle apart, in rings of
    brightness."""
    chosen: dict[tuple[int, int, int], None] = {}
    for index in count_from():
        if len(chosen) >= count:
            return list(chosen)
        hue = (0.58 + index * 0.6180339887498949) % 1
        saturation, value = (0.85, 0.6, 0.95, 0.45)[index // 12 % 4], (1.0, 0.9, 0.7, 0.8)[index // 24 % 4]
        red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
        chosen.setdefault((round(red * 255), round(green * 255), round(blue * 255)))
    raise AssertionError("count_from never ends")


def result(job: Job, instances: Sequence[Instance], size_wh: tuple[int, int], facts: Facts, **extra: Any) -> Result:
    """Files, labels and metadata of a segmenting kind; `extra` goes into the metadata, its `warnings` first in the list."""
    drawn = [instance.mask for instance in instances if instance.drawn]
    palette = colours(len(drawn))
    labels, cut = _labels(instances, palette)
    warnings = [*extra.pop("warnings", ()), *([cut] if cut else [])]
    name = job.image.name if job.image else ""
    metadata = {
        "engine": facts.engine,
        "model_id": facts.model_id,
        "device": facts.device,
        "image_width": size_wh[0],
        "image_height": size_wh[1],
        "count": len(drawn),
        "confidence": max((round(mask.score, 4) for mask in drawn), default=None),
        "embedding_cached": facts.embedding_cached,
        "warnings": warnings,
        **extra,
    }
    blobs = (
        ResultBlob("mask_image_url", "mask.png", "image/png", mask_png(drawn, palette, size_wh)),
        ResultBlob("masks_url", "masks.json", "application/json", dataset(instances, size_wh, name)),
    )
    return Result(blobs, labels, metadata)


def _labels(instances: Sequence[Instance], palette: Sequence[tuple[int, int, int]]) -> tuple[list[dict[str, Any]], str | None]:
    """One entry per instance in order of id, or the best that fit into the row, and a warning that says so."""
    entries = [_label(index, instance, palette) for index, instance in enumerate(instances)]
    sizes = [len(json.dumps(entry, ensure_ascii=False).encode()) + 2 for entry in entries]
    if sum(sizes) + 2 <= LABELS_BYTES_MAX:
        return entries, None
    kept, room = set(), LABELS_BYTES_MAX - 2
    for index in sorted(range(len(entries)), key=lambda index: -entries[index]["score"]):
        room -= sizes[index]
        if room < 0:
            break
        kept.add(index)
    warning = f"labels lists the {len(kept)} best of {len(entries)} masks; masks_url has all of them"
    return [entry for index, entry in enumerate(entries) if index in kept], warning


def _label(index: int, instance: Instance, palette: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
    """`color` is None for a mask that is not drawn."""
    return {
        "id": index + 1,
        "label": instance.label,
        "score": round(instance.mask.score, 4),
        "box": list(instance.mask.box_xyxy),
        "area": instance.mask.area,
        "color": "#{:02X}{:02X}{:02X}".format(*palette[index]) if instance.drawn else None,
        "object": instance.object,
    }
