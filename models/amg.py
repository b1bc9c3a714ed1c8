"""Everything mode by low-resolution filtering: a grid of clicks, most answers dropped before anything is enlarged.

Enters: functions that answer clicks with logits. Leaves: masks, once somebody enlarges them. The thresholds, their order and the
crops are those of segment-anything's mask generator; stability and boxes are taken at low resolution, which changes little and
costs a fraction.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import numpy.typing as npt

from models.base import EverythingOptions, Later, Mask, Stop
from models.framing import Floats, Frame, box_of, crop_around, enlarged
from models.masks import BoxXYXY, nms

STABILITY_OFFSET = 1.0
MASKS_MAX = 1000
"""Of an answer, the best by predicted IoU: more than that is noise, which takes minutes to enlarge and to write."""
HELD_BYTES_MAX = 256 * 1024 * 1024
"""Of candidates' logits; above it the overlapping ones are dropped before all clicks are answered."""
CROP_OVERLAP = 512 / 1500
"""By how much of the short side the crops of the first layer overlap; those of the next by half of it, and so on."""
EDGE_PIXELS = 20.0
"""A box that comes so near to its crop's edge is thought to be cut off there."""

Points = npt.NDArray[np.float64]
Clicks = Callable[[Points], tuple[Floats, Floats]]
"""Points of a window, (n, 2), to logits (k, masks, low, low) and predicted IoU (k, masks). k is n, or fewer where answers that
would not pass the thresholds are left out already."""


@dataclass(frozen=True, slots=True)
class Window:
    """An image, or a crop of it whose corner is `corner_xy`, and how that lies in the model's square."""

    frame: Frame
    corner_xy: tuple[int, int] = (0, 0)

    @property
    def box_xyxy(self) -> BoxXYXY:
        """The window in pixels of the image."""
        (left, top), (height, width) = self.corner_xy, self.frame.size_hw
        return left, top, left + width, top + height


@dataclass(frozen=True, slots=True)
class Candidate:
    """A mask that passed the thresholds: its scores, its box in pixels of the image, and its logits in and just around the box,
    with the first of their cells, in its window."""

    predicted_iou: float
    stability: float
    box_xyxy: tuple[float, float, float, float]
    crop_hw: npt.NDArray[np.float16]
    cell_xy: tuple[int, int]
    window: Window


def everything(
    clicks: Clicks, frame: Frame, options: EverythingOptions, batch: int, stop: Stop, held_bytes_max: int = HELD_BYTES_MAX
) -> Later:
    """All masks of an image, largest first; `batch` clicks at a time, with `stop()` before each and before each enlarging."""
    return everywhere([(Window(frame), clicks)], frame.size_hw, options, batch, stop, held_bytes_max)


def everywhere(
    looks: Iterable[tuple[Window, Clicks]],
    size_hw: tuple[int, int],
    options: EverythingOptions,
    batch: int,
    stop: Stop,
    held_bytes_max: int = HELD_BYTES_MAX,
) -> Later:
    """The same through several windows, one after the other. Of masks that overlap, that of the smallest window is kept."""
    held: list[Candidate] = []
    for window, clicks in looks:
        held += _through(window, clicks, size_hw, options, batch, stop, held_bytes_max)
    kept = _apart(held, [-math.prod(candidate.window.frame.size_hw) for candidate in held], options.box_nms_thresh)
    return partial(_enlarged, kept[:MASKS_MAX], max(options.min_mask_area, 1), stop)


def crop_boxes(size_hw: tuple[int, int], layers: int) -> list[BoxXYXY]:
    """The crops of an image, layer by layer: 2 x 2, 4 x 4 and so on, overlapping. The image itself is none of them."""
    boxes = []
    for layer in range(1, layers + 1):
        side = 2**layer
        overlap = int(CROP_OVERLAP * min(size_hw) * 2 / side)
        height, width = (math.ceil((overlap * (side - 1) + length) / side) for length in size_hw)
        for column, row in itertools.product(range(side), repeat=2):
            left, top = (width - overlap) * column, (height - overlap) * row
            boxes.append((left, top, min(left + width, size_hw[1]), min(top + height, size_hw[0])))
    return [box for box in boxes if box[0] < box[2] and box[1] < box[3]]


def grid(points_per_side: int, size_hw: tuple[int, int]) -> Points:
    """The centres of points_per_side x points_per_side equal parts of the image, (n, 2), row by row."""
    line = (np.arange(points_per_side) + 0.5) / points_per_side
    ys, xs = np.meshgrid(line * size_hw[0], line * size_hw[1], indexing="ij")
    return np.stack([xs.ravel(), ys.ravel()], axis=1)


def stability(logits_hw: Floats, offset: float = STABILITY_OFFSET) -> float:
    """IoU of the masks that thresholds a little above and a little below 0 would give; 0 for none at all."""
    wide = int(np.count_nonzero(logits_hw > -offset))
    return int(np.count_nonzero(logits_hw > offset)) / wide if wide else 0.0


def _through(
    window: Window,
    clicks: Clicks,
    size_hw: tuple[int, int],
    options: EverythingOptions,
    batch: int,
    stop: Stop,
    held_bytes_max: int,
) -> list[Candidate]:
    """What a grid of clicks finds in one window: one of all that overlap there, none that the window's edge cuts off."""
    points_xy = grid(options.points_per_side, window.frame.size_hw)
    held: list[Candidate] = []
    for first in range(0, len(points_xy), batch):
        stop()
        options.progress(first / len(points_xy))
        found = _passing(*clicks(points_xy[first : first + batch]), window, options)
        held += [candidate for candidate in found if not _cut_off(candidate, size_hw)]
        if sum(candidate.crop_hw.nbytes for candidate in held) > held_bytes_max:
            held = _best_apart(held, options.box_nms_thresh)
    return _best_apart(held, options.box_nms_thresh)


def _passing(logits: Floats, ious: Floats, window: Window, options: EverythingOptions) -> Iterator[Candidate]:
    """What passes: predicted IoU first, since it costs nothing, then stability."""
    cells_h, cells_w = window.frame.cells_hw
    for click, index in np.argwhere(ious >= options.pred_iou_thresh):
        logits_hw = logits[click, index]
        inner_hw = logits_hw[:cells_h, :cells_w]
        stable = stability(inner_hw)
        box_xyxy = box_of(inner_hw)
        if stable < options.stability_score_thresh or box_xyxy == (0, 0, 0, 0):
            continue
        crop_hw, cell_xy = crop_around(logits_hw, box_xyxy)
        # Half precision keeps the sign, and more of a logit than the threshold can tell.
        half_hw = np.clip(crop_hw, -60000, 60000).astype(np.float16)
        yield Candidate(min(float(ious[click, index]), 1.0), stable, _in_pixels(box_xyxy, window), half_hw, cell_xy, window)


def _in_pixels(box_xyxy: BoxXYXY, window: Window) -> tuple[float, float, float, float]:
    """A box in cells of a window, in pixels of the image."""
    (cell_w, cell_h), (left, top) = window.frame.cell_wh, window.corner_xy
    x0, y0, x1, y1 = box_xyxy
    return left + x0 * cell_w, top + y0 * cell_h, left + x1 * cell_w, top + y1 * cell_h


def _cut_off(candidate: Candidate, size_hw: tuple[int, int]) -> bool:
    """Whether the box comes near an edge of its window that is no edge of the image."""
    edges = zip(candidate.box_xyxy, candidate.window.box_xyxy, (0, 0, size_hw[1], size_hw[0]), strict=True)
    return any(abs(edge - own) <= EDGE_PIXELS < abs(edge - outer) for edge, own, outer in edges)


def _best_apart(candidates: list[Candidate], iou_max: float) -> list[Candidate]:
    """One of all that overlap, the best first, as many as an answer may have."""
    return _apart(candidates, [candidate.predicted_iou for candidate in candidates], iou_max)[:MASKS_MAX]


def _apart(candidates: list[Candidate], scores: list[float], iou_max: float) -> list[Candidate]:
    """One of all whose boxes overlap by more: the one of the best score."""
    boxes_xyxy = np.array([candidate.box_xyxy for candidate in candidates], dtype=np.float64)
    return [candidates[index] for index in nms(boxes_xyxy, scores, iou_max)]


def _enlarged(candidates: list[Candidate], area_min: int, stop: Stop) -> list[Mask]:
    """The masks in the image, largest first, without those that are too small."""
    masks = []
    for candidate in candidates:
        stop()
        window = candidate.window
        crop_hw = candidate.crop_hw.astype(np.float32)
        mask = enlarged(crop_hw, candidate.cell_xy, window.frame, candidate.predicted_iou, candidate.stability)
        if mask.area >= area_min:
            masks.append(_shifted(mask, window.corner_xy))
    return sorted(masks, key=lambda mask: -mask.area)


def _shifted(mask: Mask, by_xy: tuple[int, int]) -> Mask:
    (x0, y0, x1, y1), (dx, dy) = mask.box_xyxy, by_xy
    return replace(mask, box_xyxy=(x0 + dx, y0 + dy, x1 + dx, y1 + dy))
