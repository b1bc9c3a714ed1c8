"""The engine that looks at nothing."""

from __future__ import annotations

import numpy as np
from support.engines import embedded, everything, never_stop, segmented

from models.base import Canvas, EverythingOptions, Hole, Prompt, pack
from models.mock import Mock

EMBEDDING = embedded(Mock(), np.zeros((60, 80, 3), dtype=np.uint8))


def test_a_box_is_its_own_mask() -> None:
    [[mask]] = segmented(Mock(), EMBEDDING, [Prompt(box_xyxy=(10, 20, 30, 50))], None)
    assert (mask.box_xyxy, mask.area) == ((10, 20, 30, 50), 600)


def test_a_point_becomes_a_disc_around_it() -> None:
    [[mask]] = segmented(Mock(), EMBEDDING, [Prompt(points_xy=((40, 30),), labels=(1,))], None)
    assert mask.box_xyxy == (34, 24, 47, 37)


def test_multimask_gives_three_of_falling_score() -> None:
    [masks] = segmented(Mock(), EMBEDDING, [Prompt(box_xyxy=(0, 0, 5, 5))], True)
    assert [mask.score for mask in masks] == [0.9, 0.6, 0.3]


def test_everything_is_four_squares() -> None:
    masks = everything(Mock(), EMBEDDING, EverythingOptions())
    assert [mask.box_xyxy for mask in masks] == [(20, 15, 35, 30), (60, 15, 75, 30), (20, 45, 35, 60), (60, 45, 75, 60)]


def test_a_hole_is_filled_with_the_mean_colour_of_its_box() -> None:
    image_hwc = np.zeros((60, 80, 3), dtype=np.uint8)
    image_hwc[10:20, 10:30] = (10, 200, 30)
    mask_hw = (image_hwc > 0).any(axis=2)
    [[patch], none] = Mock().inpaint([Hole(image_hwc, pack(mask_hw)), Hole(image_hwc, pack(~mask_hw & mask_hw))], never_stop)
    assert (patch.box_xyxy, patch.pixels_hwc.shape) == ((10, 10, 30, 20), (10, 20, 3))
    assert (patch.pixels_hwc == (10, 200, 30)).all()
    assert none == []


def test_a_picture_gets_a_colour_of_its_prompt_and_seed_under_its_mask() -> None:
    mask_hw = np.zeros((16, 24), dtype=np.bool_)
    mask_hw[4:8, 4:8] = True
    grey_hwc = np.full((16, 24, 3), 127, dtype=np.uint8)
    asked = [Canvas(grey_hwc, mask_hw, prompt, seed=seed, steps=4) for prompt, seed in (("a", 1), ("a", 1), ("b", 1), ("a", 2))]
    shares: list[float] = []
    answers = Mock().generate(asked, never_stop, shares.append)
    assert shares == [0.25, 0.5, 0.75, 1]
    assert all(answer.dtype == np.uint8 and (answer[~mask_hw] == 127).all() for answer in answers)
    colours = [tuple(answer[5, 5].tolist()) for answer in answers]
    assert (colours[0], len(set(colours))) == (colours[1], 3)
