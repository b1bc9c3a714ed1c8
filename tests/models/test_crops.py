"""Where inpainters look: crops around each hole, none over another, and the way there and back."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.photos import photo

from models.base import Hole, Mask, MaskHW, pack
from models.crops import batches, crops, cut, patch, shrunk_hw

Box = tuple[int, int, int, int]


@st.composite
def masks(draw: st.DrawFn) -> MaskHW:
    """Rectangles and single pixels in an image of up to 900 pixels a side; also none."""
    height, width = draw(st.integers(1, 900)), draw(st.integers(1, 900))
    mask_hw = np.zeros((height, width), dtype=np.bool_)
    for _ in range(draw(st.integers(0, 6))):
        y, x = draw(st.integers(0, height - 1)), draw(st.integers(0, width - 1))
        mask_hw[y : y + draw(st.integers(1, 80)), x : x + draw(st.integers(1, 300))] = True
    return mask_hw


def rectangle(box_xyxy: Box) -> Mask:
    x0, y0, x1, y1 = box_xyxy
    return pack(np.ones((y1 - y0, x1 - x0), dtype=np.bool_), (x0, y0))


def apart(*boxes: Box) -> Mask:
    """One mask of several rectangles."""
    whole_hw = np.zeros((1000, 2000), dtype=np.bool_)
    for x0, y0, x1, y1 in boxes:
        whole_hw[y0:y1, x0:x1] = True
    return pack(whole_hw)


@settings(max_examples=60, deadline=None)
@given(masks())
def test_each_missing_pixel_lies_in_one_crop_with_its_margin_and_every_crop_in_the_image(mask_hw: MaskHW) -> None:
    height, width = mask_hw.shape
    times_hw = np.zeros(mask_hw.shape, dtype=np.int64)
    for x0, y0, x1, y1 in crops(pack(mask_hw), (height, width)):
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert x1 - x0 >= min(257, width)
        assert y1 - y0 >= min(257, height)
        assert mask_hw[y0:y1, x0:x1].any()
        times_hw[y0:y1, x0:x1] += 1
    assert (times_hw[mask_hw] == 1).all()
    assert times_hw.max() <= 1


@settings(max_examples=100)
@given(st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 2000))
def test_a_shrunk_size_fits_and_a_fitting_one_is_unchanged(height: int, width: int, side_max: int) -> None:
    shrunk = shrunk_hw((height, width), side_max)
    assert max(shrunk) == min(max(height, width), side_max)
    assert min(shrunk) >= 1
    assert shrunk == (height, width) or max(height, width) > side_max


@pytest.mark.parametrize(
    ("hole", "wanted"),
    [
        ((900, 400, 1000, 440), (772, 272, 1128, 568)),  # 128 on each side
        ((600, 300, 1000, 500), (400, 100, 1200, 700)),  # half of 400
        ((0, 0, 10, 10), (0, 0, 266, 266)),  # shifted from the corner
        ((1990, 500, 2000, 510), (1734, 372, 2000, 638)),
        ((100, 100, 1900, 900), (0, 0, 2000, 1000)),
    ],
)
def test_the_margin_is_half_the_longer_side_but_128_at_least_and_shifted_at_edges(hole: Box, wanted: Box) -> None:
    assert crops(rectangle(hole), (1000, 2000)) == [wanted]


def test_parts_far_apart_have_crops_of_their_own_and_near_ones_share_theirs() -> None:
    far = apart((200, 400, 210, 410), (900, 400, 910, 410))
    assert crops(far, (1000, 2000)) == [(72, 272, 338, 538), (772, 272, 1038, 538)]
    near = apart((200, 400, 210, 410), (300, 300, 310, 310))
    assert crops(near, (1000, 2000)) == [(72, 172, 438, 538)]


def test_a_crop_that_grows_over_another_takes_it_along() -> None:
    parts = [(0, 0, 10, 10), (400, 300, 410, 310), (180, 250, 190, 260), (50, 528, 60, 538)]
    assert crops(apart(*parts), (1000, 2000)) == [(0, 0, 538, 666)]
    upside_down = [(x0, 1000 - y1, x1, 1000 - y0) for x0, y0, x1, y1 in parts]
    assert crops(apart(*upside_down), (1000, 2000)) == [(0, 334, 538, 1000)]
    assert len(crops(apart(parts[1], parts[3]), (1000, 2000))) == 2


def test_specks_by_the_thousand_are_merged_in_no_time() -> None:
    specks_hw = np.zeros((2000, 2000), dtype=np.bool_)
    specks_hw[::6, ::6] = True
    assert crops(pack(specks_hw), (2000, 2000)) == [(0, 0, 2000, 2000)]


def test_nothing_missing_needs_no_crop() -> None:
    assert crops(pack(np.zeros((5, 5), dtype=np.bool_)), (5, 5)) == []


def test_a_cut_that_fits_is_a_copy_of_the_pixels() -> None:
    hole = Hole(photo("coffee"), rectangle((110, 120, 130, 150)))
    own = cut(hole, (100, 100, 200, 180), 100)
    assert (own.pixels_hwc == photo("coffee")[100:180, 100:200]).all()
    assert (own.missing_hw == hole.mask.window_hw((100, 100, 200, 180))).all()
    assert own.pixels_hwc.flags.writeable
    assert not np.shares_memory(own.pixels_hwc, photo("coffee"))


@pytest.mark.parametrize("size", [(1600, 1600), (1601, 1303), (3000, 40)])
def test_a_reduced_cut_keeps_every_missing_pixel(size: tuple[int, int]) -> None:
    width, height = size
    for x, y in [(0, 0), (width - 1, height - 1), (width // 2, height // 3)]:
        hole = Hole(np.zeros((height, width, 3), dtype=np.uint8), rectangle((x, y, x + 1, y + 1)))
        own = cut(hole, (0, 0, width, height), 100)
        assert max(own.missing_hw.shape) == 100
        assert own.missing_hw.any()
        assert own.missing_hw.sum() <= 4
        assert own.pixels_hwc.shape == (*own.missing_hw.shape, 3)


def test_a_patch_has_the_size_of_its_box() -> None:
    small_hwc = np.full((10, 20, 3), 77, dtype=np.uint8)
    for box_xyxy in [(5, 5, 25, 15), (5, 5, 66, 36), (0, 0, 1, 1)]:
        made = patch(box_xyxy, small_hwc)
        assert made.pixels_hwc.shape == (box_xyxy[3] - box_xyxy[1], box_xyxy[2] - box_xyxy[0], 3)
        assert (made.pixels_hwc == 77).all()


def test_batches_hold_what_is_alike_in_order_and_no_more_than_allowed() -> None:
    assert list(batches("abaabca", 2)) == [[0, 2], [3, 6], [1, 4], [5]]
    assert list(batches([], 2)) == []
