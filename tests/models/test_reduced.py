"""A reduced copy of an image in place of it: every engine answers in pixels of the image itself, and nearly the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import engine as mobile_sam
from support.engines import everything, segmented
from support.photos import COFFEE_BOX, photo
from support.pictures import saved
from support.sam2_checkpoints import engine as sam2
from support.sam3_checkpoints import engine as sam3

from models.base import EverythingOptions, ImageHWC, Prompt
from models.classical import Classical
from models.masks import mask_iou
from models.mock import Mock
from storage.images import decode

SIZE_HW = (1101, 1601)
SIDE = 400
ENGINES: dict[str, Callable[[], Any]] = {
    "mock": Mock,
    "classical": Classical,
    "mobilesam": mobile_sam,
    "sam2": lambda: sam2(crop_layers=1),
    "sam3": sam3,
}


@pytest.fixture(scope="module")
def image_hwc() -> ImageHWC:
    return np.asarray(Image.fromarray(photo("coffee")).resize(SIZE_HW[::-1], Image.Resampling.BICUBIC))


def reduced(image_hwc: ImageHWC, side: int) -> ImageHWC:
    """As a session keeps it."""
    data = saved(Image.fromarray(image_hwc), "PNG")
    return decode(data, bytes_max=len(data), pixels_max=image_hwc.size, side_max=side).pixels_hwc


@pytest.mark.parametrize("name", ENGINES)
def test_masks_of_a_reduced_copy_are_those_of_the_image(name: str, image_hwc: ImageHWC) -> None:
    model = ENGINES[name]()
    small_hwc = reduced(image_hwc, SIDE)
    assert max(small_hwc.shape) == SIDE
    box = tuple(edge * size / side for edge, size, side in zip(COFFEE_BOX, SIZE_HW[::-1] * 2, (600, 400) * 2, strict=True))
    whole, copy = model.embed([model.shrink(image_hwc)]) + model.embed([model.shrink(small_hwc, SIZE_HW)])
    assert whole.size_hw == copy.size_hw == SIZE_HW
    (wanted,), (found,) = (segmented(model, embedding, [Prompt(box_xyxy=box)])[0] for embedding in (whole, copy))
    assert mask_iou(found, wanted) > 0.85
    options = EverythingOptions(points_per_side=4, pred_iou_thresh=0.0, stability_score_thresh=0.0)
    for mask in everything(model, copy, options):
        assert 0 <= mask.box_xyxy[0] < mask.box_xyxy[2] <= SIZE_HW[1]
        assert 0 <= mask.box_xyxy[1] < mask.box_xyxy[3] <= SIZE_HW[0]


def test_mobile_sam_sees_the_very_same_in_a_copy_that_is_as_large_as_its_square(image_hwc: ImageHWC) -> None:
    model = mobile_sam()
    whole, copy = model.shrink(image_hwc), model.shrink(reduced(image_hwc, model.contract.side), SIZE_HW)
    assert whole[0] == copy[0]
    np.testing.assert_array_equal(whole[1], copy[1])


@pytest.mark.parametrize("size_hw", [(4000, 1), (1, 3000), (1401, 7)])
def test_crops_are_as_many_in_a_copy_of_the_thinnest_image(size_hw: tuple[int, int]) -> None:
    model = sam2(crop_layers=1)
    image_hwc = np.zeros((*size_hw, 3), dtype=np.uint8)
    whole, copy = model.shrink(image_hwc), model.shrink(reduced(image_hwc, SIDE), size_hw)
    assert len(whole.crops_hwc) == len(copy.crops_hwc)
