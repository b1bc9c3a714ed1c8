"""How an image lies in a model's square, and the way back: prompts to model pixels, low-resolution logits to masks.

Enters: pixels of the image. Leaves: pixels of the model, and `Mask` values of the image. The one place that knows of padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.base import Mask, pack
from models.masks import BoxXYXY

Floats = npt.NDArray[np.float32]
SURE = 10.0
"""The logit of a pixel that a mask prompt is sure of, as in Meta's code."""


@dataclass(frozen=True, slots=True)
class Frame:
    """An image of `size_hw` that fills the upper left `inner_hw` of a square of `side` model pixels; the model's masks have
    `low_side` cells a side over the whole square."""

    size_hw: tuple[int, int]
    inner_hw: tuple[int, int]
    side: int
    low_side: int

    @property
    def cell_wh(self) -> tuple[float, float]:
        """Image pixels per cell of a low-resolution mask."""
        model_pixels = self.side / self.low_side
        (height, width), (inner_height, inner_width) = self.size_hw, self.inner_hw
        return width / inner_width * model_pixels, height / inner_height * model_pixels

    @property
    def cells_hw(self) -> tuple[int, int]:
        """Cells that hold any of the image; the others hold padding only."""
        height, width = (math.ceil(inner * self.low_side / self.side) for inner in self.inner_hw)
        return height, width

    def points(self, points_xy: npt.ArrayLike) -> Floats:
        """Points of the image, (n, 2), in model pixels."""
        scale_xy = np.array([self.inner_hw[1] / self.size_hw[1], self.inner_hw[0] / self.size_hw[0]])
        scaled: Floats = (np.asarray(points_xy, dtype=np.float64).reshape(-1, 2) * scale_xy).astype(np.float32)
        return scaled

    def mask_logits(self, mask: Mask) -> Floats:
        """A mask of the image as logits, (low_side, low_side): +10 inside, -10 outside, between them on the edge."""
        import cv2

        logits_hw = np.full((self.low_side, self.low_side), -SURE, dtype=np.float32)
        (cell_w, cell_h), (cells_h, cells_w) = self.cell_wh, self.cells_hw
        left, top = int(mask.box_xyxy[0] / cell_w), int(mask.box_xyxy[1] / cell_h)
        right = min(math.ceil(mask.box_xyxy[2] / cell_w), cells_w)
        bottom = min(math.ceil(mask.box_xyxy[3] / cell_h), cells_h)
        window = tuple(round(edge) for edge in (left * cell_w, top * cell_h, right * cell_w, bottom * cell_h))
        seen_hw = mask.window_hw((window[0], window[1], max(window[2], window[0] + 1), max(window[3], window[1] + 1)))
        share_hw = cv2.resize(seen_hw.astype(np.float32), (right - left, bottom - top), interpolation=cv2.INTER_AREA)
        logits_hw[top:bottom, left:right] = (2 * share_hw - 1) * SURE
        return logits_hw


def fitted(size_hw: tuple[int, int], side: int, low_side: int) -> Frame:
    """The frame of an image whose long side becomes `side`, as SAM resizes: to the nearest pixel, padded right and below."""
    scale = side / max(size_hw)
    height, width = (max(int(length * scale + 0.5), 1) for length in size_hw)
    return Frame(size_hw, (height, width), side, low_side)


def box_of(logits_hw: Floats) -> BoxXYXY:
    """The box of the cells above 0, half-open; (0, 0, 0, 0) when there are none."""
    inside_hw = logits_hw > 0
    rows = np.flatnonzero(inside_hw.any(axis=1))
    if not rows.size:
        return 0, 0, 0, 0
    columns = np.flatnonzero(inside_hw.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def enlarged(
    crop_hw: Floats, corner_xy: tuple[int, int], frame: Frame, predicted_iou: float, stability_score: float | None = None
) -> Mask:
    """The mask of a crop of low-resolution logits whose first cell is `corner_xy`: above 0 after bilinear interpolation,
    computed over the crop's own pixels of the image only. Interpolates as `align_corners=False` does: by pixel centres."""
    import cv2

    (cell_w, cell_h), (height, width) = frame.cell_wh, frame.size_hw
    left, right = _span(corner_xy[0], crop_hw.shape[1], cell_w, width)
    top, bottom = _span(corner_xy[1], crop_hw.shape[0], cell_h, height)
    if right <= left or bottom <= top:
        return pack(np.zeros((0, 0), dtype=np.bool_), score=predicted_iou, predicted_iou=predicted_iou)
    to_cells = np.array(
        [
            [1 / cell_w, 0, (left + 0.5) / cell_w - 0.5 - corner_xy[0]],
            [0, 1 / cell_h, (top + 0.5) / cell_h - 0.5 - corner_xy[1]],
        ]
    )
    full_hw = cv2.warpAffine(
        crop_hw,
        to_cells,
        (right - left, bottom - top),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    found_hw = full_hw > 0
    return pack(found_hw, (left, top), score=predicted_iou, predicted_iou=predicted_iou, stability_score=stability_score)


def _span(first: int, count: int, cell: float, length: int) -> tuple[int, int]:
    """The pixels of the image whose centres lie in these cells."""
    return max(math.floor(first * cell), 0), min(math.ceil((first + count) * cell), length)


def crop_around(logits_hw: Floats, box_xyxy: BoxXYXY) -> tuple[Floats, tuple[int, int]]:
    """The logits in a box and one cell around it, as far as there is one, and the crop's first cell (x, y)."""
    x0, y0 = max(box_xyxy[0] - 1, 0), max(box_xyxy[1] - 1, 0)
    return logits_hw[y0 : box_xyxy[3] + 1, x0 : box_xyxy[2] + 1], (x0, y0)


def mask_of(logits_hw: Floats, frame: Frame, predicted_iou: float) -> Mask:
    """The mask of low-resolution logits over the whole square, padding left out; its score is the predicted IoU."""
    cells_h, cells_w = frame.cells_hw
    crop_hw, corner_xy = crop_around(logits_hw, box_of(logits_hw[:cells_h, :cells_w]))
    return enlarged(crop_hw, corner_xy, frame, predicted_iou)


def masks_of(logits_nhw: Floats, frame: Frame, ious: Sequence[float], count: int) -> list[Mask]:
    """The best masks by predicted IoU, which is their score, best first; only `count` are enlarged."""
    order = sorted(range(len(ious)), key=lambda index: -ious[index])[:count]
    return [mask_of(logits_nhw[index], frame, min(max(float(ious[index]), 0.0), 1.0)) for index in order]
