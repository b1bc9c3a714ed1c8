"""Arithmetic on boxes and masks that every engine needs: IoU, suppression, enlarging inside a box.

Enters: bool arrays at an engine's own resolution, boxes in pixels. Leaves: `Mask` values and indexes. Never a full-size
array where a box does.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from models.base import Mask, MaskHW, pack

__all__ = ["box_area", "box_ious", "enlarge", "intersection", "mask_iou", "nms", "pack", "surround"]

BoxXYXY = tuple[int, int, int, int]
BoxesXYXY = npt.NDArray[np.floating] | npt.NDArray[np.integer]


def box_area(box_xyxy: BoxXYXY) -> int:
    """Pixels in a half-open box; 0 when it is empty or inverted."""
    x0, y0, x1, y1 = box_xyxy
    return max(x1 - x0, 0) * max(y1 - y0, 0)


def surround(a_xyxy: BoxXYXY, b_xyxy: BoxXYXY) -> BoxXYXY:
    """The smallest box around both."""
    return (
        min(a_xyxy[0], b_xyxy[0]),
        min(a_xyxy[1], b_xyxy[1]),
        max(a_xyxy[2], b_xyxy[2]),
        max(a_xyxy[3], b_xyxy[3]),
    )


def intersection(a_xyxy: BoxXYXY, b_xyxy: BoxXYXY) -> BoxXYXY:
    """What lies in both boxes; (0, 0, 0, 0) when nothing does."""
    box = (
        max(a_xyxy[0], b_xyxy[0]),
        max(a_xyxy[1], b_xyxy[1]),
        min(a_xyxy[2], b_xyxy[2]),
        min(a_xyxy[3], b_xyxy[3]),
    )
    return box if box_area(box) else (0, 0, 0, 0)


def box_ious(box_xyxy: npt.NDArray[np.floating], boxes_xyxy: npt.NDArray[np.floating]) -> npt.NDArray[np.float64]:
    """IoU of one box, shape (4,), with each of `boxes_xyxy`, shape (n, 4); shape (n,), 0 where both are empty."""
    low_xy = np.maximum(box_xyxy[:2], boxes_xyxy[:, :2])
    high_xy = np.minimum(box_xyxy[2:], boxes_xyxy[:, 2:])
    common = np.clip(high_xy - low_xy, 0, None).prod(axis=1)
    area = np.clip(box_xyxy[2:] - box_xyxy[:2], 0, None).prod()
    areas = np.clip(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2], 0, None).prod(axis=1)
    either = area + areas - common
    ious: npt.NDArray[np.float64] = np.divide(common, either, out=np.zeros(len(boxes_xyxy)), where=either > 0)
    return ious


def nms(boxes_xyxy: BoxesXYXY, scores: npt.ArrayLike, iou_max: float) -> list[int]:
    """Greedy non-maximum suppression: indexes kept, best score first; a box goes when its IoU with a kept one is above `iou_max`.

    `boxes_xyxy` has shape (n, 4), `scores` (n,). Equal scores keep their order.
    """
    boxes = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    order = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    kept: list[int] = []
    while order.size:
        best, order = int(order[0]), order[1:]
        kept.append(best)
        order = order[box_ious(boxes[best], boxes[order]) <= iou_max]
    return kept


def mask_iou(a: Mask, b: Mask) -> float:
    """IoU of two masks in pixels; 0 when both are empty."""
    box_xyxy = intersection(a.box_xyxy, b.box_xyxy)
    common = int((a.window_hw(box_xyxy) & b.window_hw(box_xyxy)).sum()) if box_area(box_xyxy) else 0
    either = a.area + b.area - common
    return common / either if either else 0.0


def enlarge(
    mask_hw: MaskHW, origin_xy: tuple[float, float], pixel_wh: tuple[float, float], size_hw: tuple[int, int]
) -> tuple[MaskHW, tuple[int, int]]:
    """A mask found at low resolution, at full resolution, inside its own box only: (bool crop, offset_xy of the crop).

    `origin_xy` is where the corner of `mask_hw` lies in the image, `pixel_wh` how many image pixels one of its pixels
    covers, `size_hw`
    the image's size. The edge is the half level of the slightly blurred mask, interpolated, so steps of the low resolution
    vanish.
    """
    import cv2

    low = pack(mask_hw)
    if not box_area(low.box_xyxy):
        return np.zeros((0, 0), dtype=np.bool_), (0, 0)
    x0, y0, x1, y1 = intersection(_grow(low.box_xyxy, 3), (0, 0, mask_hw.shape[1], mask_hw.shape[0]))
    soft_hw = np.multiply(mask_hw[y0:y1, x0:x1], 255, dtype=np.uint8)
    soft_hw = cv2.GaussianBlur(soft_hw, (0, 0), 0.8, borderType=cv2.BORDER_REPLICATE)
    (width, height), (ox, oy) = pixel_wh, origin_xy
    left, top = max(math.floor(ox + x0 * width), 0), max(math.floor(oy + y0 * height), 0)
    right, bottom = min(math.ceil(ox + x1 * width), size_hw[1]), min(math.ceil(oy + y1 * height), size_hw[0])
    if right <= left or bottom <= top:
        return np.zeros((0, 0), dtype=np.bool_), (0, 0)
    to_low = np.array(
        [
            [1 / width, 0, (left + 0.5 - ox) / width - 0.5 - x0],
            [0, 1 / height, (top + 0.5 - oy) / height - 0.5 - y0],
        ]
    )
    full_hw = cv2.warpAffine(
        soft_hw,
        to_low,
        (right - left, bottom - top),
        flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
        borderMode=cv2.BORDER_REPLICATE,
    )
    return full_hw > 127, (left, top)


def _grow(box_xyxy: BoxXYXY, margin: int) -> BoxXYXY:
    x0, y0, x1, y1 = box_xyxy
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin
