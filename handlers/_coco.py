"""The masks of a result as a COCO dataset, which pycocotools reads; overlaps are kept here.

Enters: instances in order of id. Leaves: JSON bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import cv2
import numpy as np

from handlers._rle import segmentation
from models.base import Mask

POLYGON_ERROR = 0.002
"""How far, of the mask's longer side, a polygon may leave the contour; at least one pixel."""


class Found(Protocol):
    """A mask with what it is called and what asked for it (`_instances.Instance`)."""

    @property
    def mask(self) -> Mask: ...
    @property
    def label(self) -> str: ...
    @property
    def object(self) -> int | None: ...


def dataset(instances: Sequence[Found], size_wh: tuple[int, int], file_name: str) -> bytes:
    """The dataset of one image; annotation ids are places in the list, from 1."""
    names = list(dict.fromkeys(instance.label for instance in instances))
    categories = {name: index + 1 for index, name in enumerate(names)}
    width, height = size_wh
    document = {
        "images": [{"id": 1, "width": width, "height": height, "file_name": file_name}],
        "categories": [{"id": index, "name": name} for name, index in categories.items()],
        "annotations": [
            _annotation(index + 1, instance, categories[instance.label], size_wh) for index, instance in enumerate(instances)
        ],
    }
    return json.dumps(document, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()


def _annotation(mask_id: int, instance: Found, category: int, size_wh: tuple[int, int]) -> dict[str, Any]:
    mask = instance.mask
    x0, y0, x1, y1 = mask.box_xyxy
    annotation = {
        "id": mask_id,
        "image_id": 1,
        "category_id": category,
        "iscrowd": 0,
        "bbox": [x0, y0, x1 - x0, y1 - y0],
        "area": mask.area,
        "segmentation": segmentation(mask, size_wh),
        "score": round(mask.score, 4),
    }
    for name, value in (("predicted_iou", mask.predicted_iou), ("stability_score", mask.stability_score)):
        if value is not None:
            annotation[name] = round(value, 4)
    if instance.object is not None:
        annotation["object"] = instance.object
    return annotation | {"polygons": polygons(mask)}


def polygons(mask: Mask) -> list[list[float]]:
    """The outer contours through the centres of the border pixels, simplified (Douglas and Peucker), as COCO's flat [x, y,
    x, y, …].

    For drawing; the run lengths are the truth. Contours of fewer than three corners are left out.
    """
    crop_hw = mask.crop_hw()
    if not crop_hw.size:
        return []
    offset_xy = np.array(mask.box_xyxy[:2]) + 0.5
    contours, _ = cv2.findContours(crop_hw.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    error = max(POLYGON_ERROR * max(crop_hw.shape), 1.0)
    rings = [cv2.approxPolyDP(contour, error, closed=True).reshape(-1, 2) for contour in contours]
    return [(ring_xy + offset_xy).ravel().tolist() for ring_xy in rings if len(ring_xy) >= 3]
