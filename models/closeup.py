"""GrabCut on a close-up: a crop around one object, small enough to be quick, with its way back to the image.

Enters: a `Sketch` of what is surely and what is probably the object. Leaves: a bool mask of the close-up. Same input, same
answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt

from models.base import ImageHWC, MaskHW
from models.masks import BoxXYXY

COARSE_SIDE = 128
COARSE_ROUNDS = 3
SIDE_MIN = 4
SEED = 20041
"""GrabCut starts its colour models by k-means from OpenCV's generator of this thread."""

BytesHW = npt.NDArray[np.uint8]
"""One of cv2.GC_BGD, GC_FGD, GC_PR_BGD, GC_PR_FGD per pixel."""


@dataclass(frozen=True, slots=True)
class Closeup:
    """A crop of the image: uint8 RGB; its corner in image pixels; how many image pixels one of its pixels covers."""

    image_hwc: ImageHWC
    origin_xy: tuple[float, float]
    pixel_wh: tuple[float, float]

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the crop in its own pixels."""
        return self.image_hwc.shape[0], self.image_hwc.shape[1]

    def at(self, point_xy: tuple[float, float]) -> tuple[int, int]:
        """The pixel (column, row) of the crop under a point of the image, the nearest one when the point lies outside."""
        column = int((point_xy[0] - self.origin_xy[0]) / self.pixel_wh[0])
        row = int((point_xy[1] - self.origin_xy[1]) / self.pixel_wh[1])
        return min(max(column, 0), self.size_hw[1] - 1), min(max(row, 0), self.size_hw[0] - 1)

    def box(self, box_xyxy: tuple[float, float, float, float]) -> BoxXYXY:
        """A box of the image in pixels of the crop, never empty."""
        x0, y0 = self.at(box_xyxy[:2])
        x1, y1 = self.at((box_xyxy[2] - 1e-6, box_xyxy[3] - 1e-6))
        return x0, y0, max(x1, x0) + 1, max(y1, y0) + 1


def cut(image_hwc: ImageHWC, sketch_hw: BytesHW) -> MaskHW:
    """The object of a sketch, bool (height, width): GrabCut (Rother, Kolmogorov and Blake, SIGGRAPH 2004).

    Three rounds at a long side of 128, then a fourth at the sketch's own size where only a band around the first answer's
    edge is open: the max-flow over all pixels is what costs. A close-up under 4 pixels stays as it was sketched.
    """
    height, width = sketch_hw.shape
    if min(height, width) < SIDE_MIN:
        return (sketch_hw & 1).astype(np.bool_)
    sketch_hw = _with_both_sides(sketch_hw)
    shrink = COARSE_SIDE / max(height, width)
    if shrink >= 1:
        return _grabcut(image_hwc, sketch_hw, COARSE_ROUNDS + 1)
    size_wh = max(round(width * shrink), 1), max(round(height * shrink), 1)
    coarse_hwc = cv2.resize(image_hwc, size_wh, interpolation=cv2.INTER_AREA).astype(np.uint8)
    coarse_hw = _with_both_sides(cv2.resize(sketch_hw, size_wh, interpolation=cv2.INTER_NEAREST).astype(np.uint8))
    rough_hw = _grabcut(coarse_hwc, coarse_hw, COARSE_ROUNDS).astype(np.uint8) * 255
    soft_hw = cv2.resize(rough_hw, (width, height), interpolation=cv2.INTER_LINEAR)
    return _grabcut(image_hwc, _banded(sketch_hw, soft_hw > 127, round(2 / shrink) + 1), 1)


def _grabcut(image_hwc: ImageHWC, sketch_hw: BytesHW, rounds: int) -> MaskHW:
    labels_hw = sketch_hw.copy()
    cv2.setRNGSeed(SEED)
    background, foreground = np.zeros((1, 65)), np.zeros((1, 65))
    cv2.grabCut(image_hwc, labels_hw, (0, 0, 1, 1), background, foreground, rounds, cv2.GC_INIT_WITH_MASK)
    return (labels_hw & 1).astype(np.bool_)


def _banded(sketch_hw: BytesHW, rough_hw: MaskHW, reach: int) -> BytesHW:
    """The sketch with all settled that is farther than `reach` pixels from the edge of `rough_hw`."""
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * reach + 1, 2 * reach + 1))
    inside = rough_hw.astype(np.uint8)
    labels_hw = np.where(rough_hw, cv2.GC_PR_FGD, cv2.GC_PR_BGD).astype(np.uint8)
    labels_hw[cv2.erode(inside, disc) > 0] = cv2.GC_FGD
    labels_hw[cv2.dilate(inside, disc) == 0] = cv2.GC_BGD
    sure = sketch_hw <= cv2.GC_FGD
    labels_hw[sure] = sketch_hw[sure]
    return _with_both_sides(labels_hw)


def _with_both_sides(sketch_hw: BytesHW) -> BytesHW:
    """GrabCut needs pixels of either kind: without background the rim becomes probable background, without object the middle
    object."""
    inside = (sketch_hw & 1).astype(np.bool_)
    labels_hw = sketch_hw.copy()
    if inside.all():
        rim = np.ones_like(inside)
        rim[1:-1, 1:-1] = False
        labels_hw[rim] = cv2.GC_PR_BGD
    if not (labels_hw & 1).any():
        height, width = labels_hw.shape
        labels_hw[height // 3 : height - height // 3, width // 3 : width - width // 3] = cv2.GC_PR_FGD
    return labels_hw


def tidied(mask_hw: MaskHW, points_xy: list[tuple[int, int]], share_min: float = 0.1) -> MaskHW:
    """Without specks and pinholes: components smaller than `share_min` of the largest go unless they hold a point, holes
    below 1 % are filled."""
    _, labels_hw, stats, _ = cv2.connectedComponentsWithStats(mask_hw.astype(np.uint8), connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = areas >= share_min * max(areas[1:], default=0)
    kept[0] = False
    for x, y in points_xy:
        kept[labels_hw[y, x]] = labels_hw[y, x] > 0
    out_hw = kept[labels_hw]
    _, labels_hw, stats, _ = cv2.connectedComponentsWithStats((~out_hw).astype(np.uint8), connectivity=4)
    holes = stats[:, cv2.CC_STAT_AREA] < 0.01 * out_hw.sum()
    holes[0] = False
    filled_hw: MaskHW = out_hw | holes[labels_hw]
    return filled_hw


def contrast(image_hwc: ImageHWC, mask_hw: MaskHW) -> float:
    """How clearly the edge of a mask stands out, 0..1: the mean over its edge of the Lab distance d between the colours just
    inside and just outside (windows of 7 pixels), as d / (d + 15). 0 when nothing lies outside."""
    lab_hwc = np.asarray(cv2.cvtColor(image_hwc.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), dtype=np.float32)
    inside = mask_hw.astype(np.uint8)
    edge = cv2.dilate(inside, np.ones((3, 3), np.uint8)) != inside
    if not edge.any():
        return 0.0
    means = [_mean_around(lab_hwc, part.astype(np.float32), edge) for part in (mask_hw, ~mask_hw)]
    apart = np.linalg.norm(means[0] - means[1], axis=-1)
    return float(np.mean(apart / (apart + 15)))


def _mean_around(lab_hwc: npt.NDArray[np.float32], weight_hw: npt.NDArray[np.float32], at_hw: MaskHW) -> npt.NDArray[np.float32]:
    """Mean colour of the weighted pixels in the window around each pixel of `at_hw`, shape (n, 3)."""
    sums = cv2.blur(lab_hwc * weight_hw[..., None], (7, 7))[at_hw]
    weights = cv2.blur(weight_hw, (7, 7))[at_hw]
    return np.asarray(sums / np.maximum(weights, 1e-6)[:, None], dtype=np.float32)
