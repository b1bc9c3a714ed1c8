"""How an image lies in a model's square: there and back at any size, and never a pixel of padding."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.base import MaskHW, pack
from models.framing import Floats, Frame, fitted, mask_of
from models.masks import mask_iou

SIDES = st.integers(1, 3000)
ODD_SIZES = [(401, 600), (600, 401), (333, 1777), (1024, 1024), (97, 61), (2999, 2001), (5, 50)]


def logits_of(mask_hw: MaskHW, frame: Frame) -> Floats:
    """What a perfect model would answer: at the centre of each cell how deep it lies inside, in image pixels."""
    import cv2

    inside = cv2.distanceTransform(np.pad(mask_hw.astype(np.uint8), 1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    outside = cv2.distanceTransform(np.pad(1 - mask_hw.astype(np.uint8), 1, constant_values=1), cv2.DIST_L2, 5)[1:-1, 1:-1]
    signed_hw = inside - outside
    cell_w, cell_h = frame.cell_wh
    columns = ((np.arange(frame.low_side) + 0.5) * cell_w).astype(int).clip(0, frame.size_hw[1] - 1)
    rows = ((np.arange(frame.low_side) + 0.5) * cell_h).astype(int).clip(0, frame.size_hw[0] - 1)
    found: Floats = signed_hw[np.ix_(rows, columns)].astype(np.float32)
    return found


def oval(size_hw: tuple[int, int]) -> MaskHW:
    height, width = size_hw
    ys, xs = np.ogrid[:height, :width]
    inside: MaskHW = ((xs - 0.6 * width) / (0.3 * width)) ** 2 + ((ys - 0.4 * height) / (0.35 * height)) ** 2 <= 1
    return inside


@given(SIDES, SIDES)
def test_the_long_side_fills_the_square_and_the_other_is_rounded_as_sam_does(height: int, width: int) -> None:
    frame = fitted((height, width), 1024, 256)
    assert max(frame.inner_hw) == 1024
    scale = 1024 / max(height, width)
    assert frame.inner_hw == (max(int(height * scale + 0.5), 1), max(int(width * scale + 0.5), 1))


@given(SIDES, SIDES)
def test_the_corners_of_the_image_are_those_of_its_part_of_the_square(height: int, width: int) -> None:
    frame = fitted((height, width), 1024, 256)
    corners = frame.points([(0, 0), (width, height)])
    assert corners == pytest.approx(np.array([(0, 0), frame.inner_hw[::-1]]))


@pytest.mark.parametrize("size_hw", ODD_SIZES)
def test_a_mask_found_at_low_resolution_lies_where_it_was_in_the_image(size_hw: tuple[int, int]) -> None:
    truth_hw, frame = oval(size_hw), fitted(size_hw, 1024, 256)
    found = mask_of(logits_of(truth_hw, frame), frame, 0.9)
    assert mask_iou(found, pack(truth_hw)) > (0.97 if min(size_hw) > 90 else 0.85)
    assert (found.score, found.predicted_iou) == (0.9, 0.9)


@pytest.mark.parametrize("size_hw", ODD_SIZES)
def test_what_a_model_sees_in_the_padding_is_no_part_of_the_image(size_hw: tuple[int, int]) -> None:
    frame = fitted(size_hw, 1024, 256)
    logits_hw = np.full((256, 256), 5, dtype=np.float32)
    cells_h, cells_w = frame.cells_hw
    logits_hw[:cells_h, :cells_w] = -5
    assert mask_of(logits_hw, frame, 0.9).area == 0
    assert mask_of(-logits_hw, frame, 0.9).box_xyxy == (0, 0, size_hw[1], size_hw[0])


def test_enlarging_is_the_bilinear_interpolation_of_the_reference() -> None:
    frame = fitted((767, 1023), 1024, 256)
    logits_hw = np.random.default_rng(1).normal(0, 1, (256, 256)).astype(np.float32).cumsum(axis=0)
    cell_w, cell_h = frame.cell_wh
    xs = ((np.arange(1023) + 0.5) / cell_w - 0.5).clip(0, 255)
    ys = ((np.arange(767) + 0.5) / cell_h - 0.5).clip(0, 255)
    by_rows = np.array([np.interp(ys, np.arange(256), column) for column in logits_hw.T])
    expected_hw = np.array([np.interp(xs, np.arange(256), row) for row in by_rows.T]) > 0
    found_hw = mask_of(logits_hw, frame, 1.0).window_hw((0, 0, 1023, 767))
    assert (found_hw != expected_hw).mean() < 1e-4


@pytest.mark.parametrize("size_hw", [(401, 600), (1333, 777), (2999, 2001)])
def test_enlarging_at_once_is_as_good_as_the_two_steps_of_segment_anything(size_hw: tuple[int, int]) -> None:
    import cv2

    frame = fitted(size_hw, 1024, 256)
    logits_hw = cv2.GaussianBlur(np.random.default_rng(2).normal(0, 1, (256, 256)).astype(np.float32), (0, 0), 8)
    square_hw = cv2.resize(logits_hw, (1024, 1024), interpolation=cv2.INTER_LINEAR)
    expected_hw = cv2.resize(square_hw[: frame.inner_hw[0], : frame.inner_hw[1]], size_hw[::-1], interpolation=cv2.INTER_LINEAR)
    assert mask_iou(mask_of(np.asarray(logits_hw), frame, 1.0), pack(expected_hw > 0)) > 0.999


def test_enlarging_costs_no_more_than_the_masks_own_box() -> None:
    frame = fitted((3000, 4000), 1024, 256)
    logits_hw = np.full((256, 256), -5, dtype=np.float32)
    logits_hw[100:103, 50:54] = 5
    x0, y0, x1, y1 = mask_of(logits_hw, frame, 1.0).box_xyxy
    assert (x1 - x0, y1 - y0) < (5 * 16, 4 * 16)


@pytest.mark.parametrize("size_hw", ODD_SIZES)
def test_a_mask_as_a_prompt_comes_back_as_itself(size_hw: tuple[int, int]) -> None:
    truth, frame = pack(oval(size_hw)), fitted(size_hw, 1024, 256)
    logits_hw = frame.mask_logits(truth)
    assert (logits_hw.min(), logits_hw.max()) == pytest.approx((-10, 10))
    cells_h, cells_w = frame.cells_hw
    assert logits_hw[cells_h:].max(initial=-10) == logits_hw[:, cells_w:].max(initial=-10) == -10
    assert mask_iou(mask_of(logits_hw, frame, 1.0), truth) > (0.97 if min(size_hw) > 90 else 0.8)
