"""Which parts of an image an inpainter looks at: one crop per hole with what is around it, and its way there and back.

Enters: a `Hole`. Leaves: boxes that do not overlap, their pixels no larger than a network takes, and `Patch` values of the boxes'
own size. Given images are only read.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from models.base import Hole, ImageHWC, Mask, Patch
from models.masks import BoxXYXY

MARGIN_MIN = 128
MARGIN_SHARE = 0.5
"""Of the longer side of what is missing: the larger the hole, the more of its surroundings says what belongs there."""
COVERED = np.iinfo(np.uint16).max

BytesHW = npt.NDArray[np.uint8]
Boxes = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Cut:
    """A box of an image, uint8 RGB (h, w, 3), and what of it is missing, uint8 (h, w), 1 = missing; h and w are the box's own or
    smaller in the same proportion. Views of nobody's pixels, so they may be written to."""

    box_xyxy: BoxXYXY
    pixels_hwc: ImageHWC
    missing_hw: BytesHW


def crops(mask: Mask, size_hw: tuple[int, int]) -> list[BoxXYXY]:
    """Boxes of an image of that size which together hold every pixel of the mask, with a margin; no two overlap.

    One per connected part (corners connect), widened on each side by half of its longer side but at least 128 pixels; where the
    image ends, the box is shifted instead. Boxes that overlap become one: each pixel is painted from one look only. The rule is
    IOPaint's (github.com/Sanster/IOPaint), but for the relative margin and the merging. An empty mask has none.
    """
    if not mask.area:
        return []
    _, _, found, _ = cv2.connectedComponentsWithStats(mask.crop_hw().view(np.uint8), connectivity=8)
    corner_xy = np.array(mask.box_xyxy[:2], dtype=np.int64)
    low_xy = found[1:, [cv2.CC_STAT_LEFT, cv2.CC_STAT_TOP]] + corner_xy
    sides_wh = found[1:, [cv2.CC_STAT_WIDTH, cv2.CC_STAT_HEIGHT]].astype(np.int64)
    margins = np.maximum(np.ceil(sides_wh.max(axis=1, keepdims=True) * MARGIN_SHARE).astype(np.int64), MARGIN_MIN)
    boxes = _shifted_inside(low_xy - margins, sides_wh + 2 * margins, size_hw)
    return [(x0, y0, x1, y1) for x0, y0, x1, y1 in _merged(boxes).tolist()]


def shrunk_hw(size_hw: tuple[int, int], side_max: int) -> tuple[int, int]:
    """Height and width in the same proportion, the longer one at most `side_max`; unchanged if they are."""
    scale = min(side_max / max(size_hw), 1.0)
    return max(round(size_hw[0] * scale), 1), max(round(size_hw[1] * scale), 1)


def cut(hole: Hole, box_xyxy: BoxXYXY, side_max: int) -> Cut:
    """The box of a hole, reduced where it is longer than `side_max`; a reduced pixel that holds any missing one is missing."""
    x0, y0, x1, y1 = box_xyxy
    pixels_hwc = hole.image_hwc[y0:y1, x0:x1]
    missing_hw = hole.mask.window_hw(box_xyxy).view(np.uint8)
    height, width = shrunk_hw(missing_hw.shape, side_max)
    if (height, width) == missing_hw.shape:
        return Cut(box_xyxy, pixels_hwc.copy(), missing_hw)
    small_hwc = cv2.resize(pixels_hwc, (width, height), interpolation=cv2.INTER_AREA)
    share_hw = cv2.resize(np.multiply(missing_hw, COVERED, dtype=np.uint16), (width, height), interpolation=cv2.INTER_AREA)
    return Cut(box_xyxy, small_hwc.astype(np.uint8, copy=False), (share_hw > 0).astype(np.uint8))


def patch(box_xyxy: BoxXYXY, pixels_hwc: ImageHWC) -> Patch:
    """What was painted for a cut, enlarged to its box again where that was larger."""
    width, height = box_xyxy[2] - box_xyxy[0], box_xyxy[3] - box_xyxy[1]
    if pixels_hwc.shape[:2] == (height, width):
        return Patch(box_xyxy, pixels_hwc)
    full_hwc = cv2.resize(pixels_hwc, (width, height), interpolation=cv2.INTER_CUBIC)
    return Patch(box_xyxy, full_hwc.astype(np.uint8, copy=False))


def batches(keys: Sequence[Hashable], count_max: int) -> Iterator[list[int]]:
    """Indexes of equal keys, at most so many at a time, in the order in which a key came first."""
    alike: dict[Hashable, list[int]] = {}
    for index, key in enumerate(keys):
        alike.setdefault(key, []).append(index)
    for indexes in alike.values():
        yield from (indexes[first : first + count_max] for first in range(0, len(indexes), count_max))


def _shifted_inside(low_xy: Boxes, sides_wh: Boxes, size_hw: tuple[int, int]) -> Boxes:
    """Boxes (n, 4) of those corners and sides, cut to the image's size and moved until they lie in it."""
    size_wh = np.array([size_hw[1], size_hw[0]], dtype=np.int64)
    sides_wh = np.minimum(sides_wh, size_wh)
    low_xy = np.clip(low_xy, 0, size_wh - sides_wh)
    return np.concatenate([low_xy, low_xy + sides_wh], axis=1)


def _merged(boxes: Boxes) -> Boxes:
    """Boxes around those that overlap, until none do. Those before `first` overlap with none."""
    first = 0
    while first < len(boxes):
        own = boxes[first]
        touching = (boxes[:, :2] < own[2:]).all(axis=1) & (boxes[:, 2:] > own[:2]).all(axis=1)
        if touching.sum() == 1:
            first += 1
            continue
        around = np.concatenate([boxes[touching, :2].min(axis=0), boxes[touching, 2:].max(axis=0)])
        before, after = boxes[:first][~touching[:first]], boxes[first:][~touching[first:]]
        boxes, first = np.concatenate([before, around[None], after]), len(before)
    return boxes
