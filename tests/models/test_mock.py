"""The engine that looks at nothing."""

from __future__ import annotations

import numpy as np
from support.engines import embedded, everything, segmented

from models.base import EverythingOptions, Prompt
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
