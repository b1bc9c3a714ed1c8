"""Everything mode by low-resolution filtering: a grid of clicks, most answers dropped before anything is enlarged.

Enters: a function that answers clicks with logits. Leaves: masks. The thresholds and their order are those of
segment-anything's mask generator; stability and boxes are taken at low resolution, which changes little and costs a fraction.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.base import EverythingOptions, Mask, Stop
from models.framing import Floats, Frame, box_of, crop_around, enlarged
from models.masks import BoxXYXY, nms

STABILITY_OFFSET = 1.0
HELD_BYTES_MAX = 256 * 1024 * 1024
"""Of candidates' logits; above it the overlapping ones are dropped before all clicks are answered."""

Points = npt.NDArray[np.float64]
Clicks = Callable[[Points], tuple[Floats, Floats]]
"""Points of the image, (n, 2), to logits (n, masks, low, low) and predicted IoU (n, masks)."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mask that passed the thresholds: its scores, its box in cells, and its logits in and just around the box."""

    predicted_iou: float
    stability: float
    box_xyxy: BoxXYXY
    crop_hw: npt.NDArray[np.float16]
    corner_xy: tuple[int, int]


def everything(
    clicks: Clicks, frame: Frame, options: EverythingOptions, batch: int, stop: Stop, held_bytes_max: int = HELD_BYTES_MAX
) -> list[Mask]:
    """All masks of an image, largest first; `batch` clicks at a time, with `stop()` before each."""
    points_xy = grid(options.points_per_side, frame.size_hw)
    held: list[Candidate] = []
    for first in range(0, len(points_xy), batch):
        stop()
        held += _passing(*clicks(points_xy[first : first + batch]), frame, options)
        if sum(candidate.crop_hw.nbytes for candidate in held) > held_bytes_max:
            held = _apart(held, options.box_nms_thresh)
    masks = []
    for candidate in _apart(held, options.box_nms_thresh):
        stop()
        mask = _enlarged(candidate, frame)
        if mask.area >= max(options.min_mask_area, 1):
            masks.append(mask)
    return sorted(masks, key=lambda mask: -mask.area)


def grid(points_per_side: int, size_hw: tuple[int, int]) -> Points:
    """The centres of points_per_side x points_per_side equal parts of the image, (n, 2), row by row."""
    line = (np.arange(points_per_side) + 0.5) / points_per_side
    ys, xs = np.meshgrid(line * size_hw[0], line * size_hw[1], indexing="ij")
    return np.stack([xs.ravel(), ys.ravel()], axis=1)


def stability(logits_hw: Floats, offset: float = STABILITY_OFFSET) -> float:
    """IoU of the masks that thresholds a little above and a little below 0 would give; 0 for none at all."""
    wide = int(np.count_nonzero(logits_hw > -offset))
    return int(np.count_nonzero(logits_hw > offset)) / wide if wide else 0.0


def _passing(logits: Floats, ious: Floats, frame: Frame, options: EverythingOptions) -> Iterator[Candidate]:
    """What passes: predicted IoU first, since it costs nothing, then stability."""
    cells_h, cells_w = frame.cells_hw
    for click, index in np.argwhere(ious >= options.pred_iou_thresh):
        logits_hw = logits[click, index]
        inner_hw = logits_hw[:cells_h, :cells_w]
        stable = stability(inner_hw)
        box_xyxy = box_of(inner_hw)
        if stable < options.stability_score_thresh or box_xyxy == (0, 0, 0, 0):
            continue
        crop_hw, corner_xy = crop_around(logits_hw, box_xyxy)
        # Half precision keeps the sign, and more of a logit than the threshold can tell.
        half_hw = np.clip(crop_hw, -60000, 60000).astype(np.float16)
        yield Candidate(min(float(ious[click, index]), 1.0), stable, box_xyxy, half_hw, corner_xy)


def _apart(candidates: list[Candidate], iou_max: float) -> list[Candidate]:
    """One of all whose boxes overlap by more: the one of the best predicted IoU."""
    boxes_xyxy = np.array([candidate.box_xyxy for candidate in candidates], dtype=np.float64)
    kept = nms(boxes_xyxy, [candidate.predicted_iou for candidate in candidates], iou_max)
    return [candidates[index] for index in kept]


def _enlarged(candidate: Candidate, frame: Frame) -> Mask:
    return enlarged(
        candidate.crop_hw.astype(np.float32),
        candidate.corner_xy,
        frame,
        candidate.predicted_iou,
        candidate.stability,
    )
