"""Holes filled without a network."""

from __future__ import annotations

import numpy as np
import pytest
from support.engines import never_stop
from support.photos import photo

from models.base import Hole, ImageHWC, Patch, StoppedError, pack
from models.telea import Telea


def hole(image_hwc: ImageHWC, *boxes: tuple[int, int, int, int]) -> Hole:
    mask_hw = np.zeros(image_hwc.shape[:2], dtype=np.bool_)
    for x0, y0, x1, y1 in boxes:
        mask_hw[y0:y1, x0:x1] = True
    return Hole(image_hwc, pack(mask_hw))


def pasted(hole: Hole, patches: list[Patch]) -> ImageHWC:
    """The image with the patches under the mask."""
    whole_hwc = hole.image_hwc.copy()
    for each in patches:
        x0, y0, x1, y1 = each.box_xyxy
        inside_hw = hole.mask.window_hw(each.box_xyxy)
        whole_hwc[y0:y1, x0:x1][inside_hw] = each.pixels_hwc[inside_hw]
    return whole_hwc


def test_a_hole_in_a_slope_of_colour_is_filled_with_the_slope() -> None:
    slope_hwc = np.tile(np.linspace(40, 200, 500).astype(np.uint8)[None, :, None], (300, 1, 3))
    spoilt_hwc = slope_hwc.copy()
    spoilt_hwc[140:150, 240:260] = (255, 0, 0)
    spoilt = hole(spoilt_hwc, (240, 140, 260, 150))
    [patches] = Telea().inpaint([spoilt], never_stop)
    assert np.abs(pasted(spoilt, patches).astype(int) - slope_hwc).max() <= 8


@pytest.mark.parametrize("side_max", [1024, 100])
def test_nothing_of_what_was_in_a_hole_is_left(side_max: int) -> None:
    grey_hwc = np.full((301, 407, 3), 90, dtype=np.uint8)
    boxes = [(0, 0, 20, 15), (200, 100, 230, 130), (390, 280, 407, 301)]
    spoilt_hwc = grey_hwc.copy()
    for x0, y0, x1, y1 in boxes:
        spoilt_hwc[y0:y1, x0:x1] = (255, 0, 0)
    spoilt = hole(spoilt_hwc, *boxes)
    [patches] = Telea(side_max).inpaint([spoilt], never_stop)
    assert np.abs(pasted(spoilt, patches).astype(int) - 90).max() <= 5


def test_each_hole_has_its_own_patches_and_no_image_is_written_to() -> None:
    coffee, chelsea = photo("coffee"), photo("chelsea")
    before = coffee.copy()
    one, two = hole(coffee, (5, 5, 9, 9), (590, 390, 596, 396)), hole(chelsea, (50, 50, 60, 60))
    answers = Telea().inpaint([one, two, hole(coffee)], never_stop)
    assert [[each.box_xyxy for each in own] for own in answers] == [
        [(0, 0, 260, 260), (338, 138, 600, 400)],
        [(0, 0, 266, 266)],
        [],
    ]
    assert (coffee == before).all()


def test_an_image_of_which_nothing_is_left_is_answered() -> None:
    for height, width in [(1, 1), (7, 300)]:
        [[whole]] = Telea().inpaint([hole(np.zeros((height, width, 3), dtype=np.uint8), (0, 0, width, height))], never_stop)
        assert whole.pixels_hwc.shape == (height, width, 3)


def test_it_stops_between_crops() -> None:
    calls: list[int] = []

    def stop() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        Telea().inpaint([hole(photo("coffee"), (5, 5, 9, 9), (590, 390, 596, 396))] * 3, stop)
    assert len(calls) == 2
