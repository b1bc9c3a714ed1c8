"""Boxes and masks: packing, windows, suppression, and enlarging inside a box."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from models.base import MaskHW, pack
from models.masks import box_ious, enlarge, mask_iou, nms

MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=20))
OFFSETS = st.tuples(st.integers(0, 9), st.integers(0, 9))


@given(MASKS, OFFSETS)
def test_a_packed_mask_seen_through_the_whole_image_is_the_mask(mask_hw: MaskHW, offset_xy: tuple[int, int]) -> None:
    x, y = offset_xy
    height, width = mask_hw.shape
    image_hw = np.zeros((40, 40), dtype=np.bool_)
    image_hw[y : y + height, x : x + width] = mask_hw
    mask = pack(mask_hw, offset_xy)
    assert (mask.window_hw((0, 0, 40, 40)) == image_hw).all()
    assert mask.area == mask_hw.sum()


@given(MASKS)
def test_the_box_of_a_packed_mask_is_tight(mask_hw: MaskHW) -> None:
    crop_hw = pack(mask_hw).crop_hw()
    assert not mask_hw.any() or all(edge.any() for edge in (crop_hw[0], crop_hw[-1], crop_hw[:, 0], crop_hw[:, -1]))


def test_an_empty_mask_has_no_box_and_no_bits() -> None:
    mask = pack(np.zeros((5, 7), dtype=np.bool_), (3, 3))
    assert (mask.box_xyxy, mask.bits.size, mask.area) == ((0, 0, 0, 0), 0, 0)


def test_a_window_that_misses_the_mask_is_empty() -> None:
    assert not pack(np.ones((2, 2), dtype=np.bool_)).window_hw((5, 5, 9, 8)).any()


def test_iou_of_masks_counts_pixels_of_both() -> None:
    a, b = pack(np.ones((4, 4), dtype=np.bool_)), pack(np.ones((4, 4), dtype=np.bool_), (2, 0))
    assert mask_iou(a, b) == pytest.approx(8 / 24)


def test_iou_of_boxes_that_only_touch_is_nothing() -> None:
    assert box_ious(np.array([0.0, 0, 2, 2]), np.array([[2.0, 0, 4, 2]])).tolist() == [0]


def test_suppression_keeps_the_best_of_boxes_that_overlap_and_all_that_do_not() -> None:
    boxes_xyxy = np.array([[0, 0, 10, 10], [1, 0, 11, 10], [30, 30, 40, 40]])
    assert nms(boxes_xyxy, [0.5, 0.9, 0.1], 0.5) == [1, 2]


def test_suppression_of_no_boxes_keeps_none() -> None:
    assert nms(np.zeros((0, 4)), [], 0.5) == []


def test_a_disc_enlarged_ten_times_is_a_disc() -> None:
    ys, xs = np.ogrid[:40, :40]
    crop_hw, offset_xy = enlarge((xs - 20) ** 2 + (ys - 20) ** 2 <= 100, (0, 0), (10, 10), (400, 400))
    ys, xs = np.ogrid[:400, :400]
    disc = pack((xs - 204.5) ** 2 + (ys - 204.5) ** 2 <= 100**2)
    assert mask_iou(pack(crop_hw, offset_xy), disc) > 0.96


def test_a_mask_that_touches_the_rim_still_does_when_enlarged() -> None:
    mask_hw = np.zeros((20, 30), dtype=np.bool_)
    mask_hw[:, :8] = True
    crop_hw, offset_xy = enlarge(mask_hw, (0, 0), (13.3, 13.35), (267, 399))
    x0, y0, _, y1 = pack(crop_hw, offset_xy).box_xyxy
    assert (x0, y0, y1) == (0, 0, 267)


def test_enlarging_reserves_no_more_than_the_masks_own_box() -> None:
    mask_hw = np.zeros((400, 400), dtype=np.bool_)
    mask_hw[200:210, 100:110] = True
    crop_hw, _ = enlarge(mask_hw, (0, 0), (10, 10), (4000, 4000))
    assert max(crop_hw.shape) <= 170
