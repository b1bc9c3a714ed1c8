"""The accepted spellings of points, boxes and masks, and the sentences that refuse all else."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from handlers import combine_masks, paint_masks, remove_object, segment_everything, segment_visual
from handlers._masks_in import inputs_of, mask_from, masks_of
from handlers._params import MaskSource, ObjectPrompt, VisualPrompts, read
from handlers._png import mask_png
from handlers._prompts import clipped, prompts_of
from handlers._rle import segmentation
from handlers.base import BlobRef, Handler, Job, Limits, MasksRef, RejectedError, Request, SourceImage
from models.base import Mask, pack
from storage.images import decode

TASK = "0b0c6e5e-6f3f-4a52-9a0d-3a5a3a6d7b11"
SIZE_WH = (60, 40)
SQUARE = pack(np.ones((10, 10), dtype=np.bool_), (20, 5))


def job(**more: Any) -> Job:
    return Job("task", None, SourceImage(np.zeros((40, 60, 3), dtype=np.uint8), "hash", "a.jpg"), **more)


def points_of(params: dict[str, Any]) -> list[tuple[float, float, int]]:
    return [(point.x, point.y, point.label) for point in read(VisualPrompts, params).all_points()]


def visual(params: dict[str, Any], text: str | None = None, limits: Limits | None = None) -> segment_visual.Wish:
    return segment_visual.parse(Request("segment_visual", "a.jpg", text, params), limits or Limits())


def refusal(params: dict[str, Any], limits: Limits | None = None) -> RejectedError:
    with pytest.raises(RejectedError) as caught:
        visual(params, limits=limits)
    return caught.value


def same(one: Mask, other: Mask) -> bool:
    return one.box_xyxy == other.box_xyxy and one.bits.tobytes() == other.bits.tobytes()


@pytest.mark.parametrize(
    "params",
    [
        {"points": [{"x": 5, "y": 3}, {"x": 1.5, "y": 2, "label": 0}]},
        {"points": [[5, 3], [1.5, 2, 0]]},
        {"points": [[5, 3, 1], {"x": 1.5, "y": 2, "label": 0}]},
        {"point_coords": [[5, 3], [1.5, 2]], "point_labels": [1, 0]},
    ],
)
def test_points_read_the_same_in_every_spelling(params: dict[str, Any]) -> None:
    assert points_of(params) == [(5, 3, 1), (1.5, 2, 0)]


def test_point_coords_without_labels_are_foreground() -> None:
    assert points_of({"point_coords": [[5, 3]]}) == [(5, 3, 1)]


def test_boxes_at_the_top_are_one_object_each() -> None:
    assert [wanted.box for wanted in visual({"boxes": [[0, 0, 5, 5], [5, 5, 9, 9]]}).objects] == [(0, 0, 5, 5), (5, 5, 9, 9)]


def test_points_and_one_box_at_the_top_are_one_object() -> None:
    (wanted,) = visual({"boxes": [[0, 0, 5, 5]], "points": [[2, 2, 0]]}).objects
    assert (wanted.box, len(wanted.all_points())) == ((0, 0, 5, 5), 1)


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"pionts": []}, ['"pionts"', '"points"']),
        ({"objects": [{"bx": [0, 0, 1, 1]}]}, ["objects[0]", '"bx"', '"box"']),
        ({"points": [{"x": 1, "y": 1, "lable": 1}]}, ["points[0]", '"lable"', '"label"']),
        ({"objects": [{"mask": {"task": TASK}}]}, ["objects[0].mask", '"task"', '"task_id"']),
        ({"points": [[1]]}, ["points[0]", "[x, y]"]),
        ({"points": [{"x": 1}]}, ["points[0].y", "required"]),
        ({"points": [[1, 2, 2]]}, ["points[0].label", "less than or equal to 1"]),
        ({"points": [["left", 2]]}, ["points[0].x", "number"]),
        ({"points": [[math.nan, 2]]}, ["points[0].x", "finite"]),
        ({"points": [[2, math.inf]]}, ["points[0].y", "finite"]),
        ({"boxes": [[0, 0, -math.inf, 2]]}, ["boxes[0][2]", "finite"]),
        ({"points": [[10**400, 2]]}, ["points[0].x"]),
        ({"boxes": [[0, 0, 5]]}, ["boxes[0]"]),
        ({"points": 5}, ["points", "list"]),
        ({"points": [[1, 2]], "point_coords": [[1, 2]]}, ["either points or point_coords"]),
        ({"point_coords": [[1, 2]], "point_labels": [1, 0]}, ["one label for each"]),
        ({"points": [[1, 2]], "boxes": [[0, 0, 5, 5], [5, 5, 9, 9]]}, ["ambiguous"]),
        ({"objects": [{"box": [0, 0, 5, 5]}], "points": [[1, 2]]}, ["either objects"]),
        ({"objects": [{"mask": {"polygon": [[0, 0], [5, 5]]}}]}, ["polygon", "at least 3"]),
        ({"objects": [{"mask": {"mask_ids": [1]}}]}, ["exactly one of"]),
        ({"objects": [{"mask": {"task_id": TASK, "image_url": "a.png"}}]}, ["exactly one of"]),
        ({"objects": [{"mask": {"image_url": "a.png", "mask_ids": [1]}}]}, ["mask_ids needs the task_id"]),
        ({"objects": [{"mask": {"task_id": "../.."}}]}, ["objects[0].mask.task_id", "UUID"]),
        ({"multimask": "perhaps"}, ["multimask", "boolean"]),
    ],
)
def test_a_sentence_says_where_it_is_wrong_and_what_would_be_right(params: dict[str, Any], words: list[str]) -> None:
    error = refusal(params)
    assert error.code == "params_invalid"
    assert all(word in error.message for word in words), error.message
    assert error.message[0].isupper()
    assert error.message[-1] in ".?"


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(), lambda inner: st.lists(inner), max_leaves=5))
def test_any_value_is_read_or_refused_never_a_crash(value: Any) -> None:
    for name in ("points", "boxes", "objects", "point_coords", "multimask"):
        try:
            visual({name: value})
        except RejectedError as error:
            assert error.code in ("params_invalid", "prompt_invalid")  # noqa: PT017 - most values raise, some do not


@pytest.mark.parametrize("params", [{}, {"points": []}, {"objects": []}, {"objects": [{}]}, {"points": [[1, 1, 0]]}])
def test_a_task_that_points_at_nothing_is_refused(params: dict[str, Any]) -> None:
    assert refusal(params).code == "prompt_invalid"


@pytest.mark.parametrize(
    ("params", "limits"),
    [
        ({"points": [[1, 1]] * 3}, Limits(points_max=2)),
        ({"boxes": [[0, 0, 1, 1]] * 3}, Limits(objects_max=2)),
    ],
)
def test_ceilings_hold_when_the_row_is_parsed(params: dict[str, Any], limits: Limits) -> None:
    assert "at most 2" in refusal(params, limits).message


def test_a_text_names_what_is_found_and_has_a_ceiling() -> None:
    assert visual({"points": [[1, 1]]}, " cup ").label == "cup"
    with pytest.raises(RejectedError, match="at most 1000"):
        visual({"points": [[1, 1]]}, "x" * 1001)


def test_thresholds_of_everything_lie_between_nothing_and_one() -> None:
    with pytest.raises(RejectedError, match="pred_iou_thresh"):
        segment_everything.parse(Request("k", "a", None, {"pred_iou_thresh": 1.5}), Limits())


def test_points_per_side_has_a_ceiling() -> None:
    with pytest.raises(RejectedError, match="at most 64"):
        segment_everything.parse(Request("k", "a", None, {"points_per_side": 65}), Limits())


@pytest.mark.parametrize("point", [(60, 5), (5, 40), (-0.1, 5), (5, -1)])
def test_a_point_outside_the_image_is_named_with_the_images_size(point: tuple[float, float]) -> None:
    with pytest.raises(RejectedError, match=r"60 x 40") as caught:
        prompts_of([ObjectPrompt.model_validate({"points": [point]})], job())
    assert caught.value.code == "prompt_invalid"
    assert f"({point[0]:g}, {point[1]:g})" in caught.value.message


@pytest.mark.parametrize("box", [(60, 0, 70, 10), (0, -5, 10, 0), (10, 10, 5, 20), (10, 10, 10, 20)])
def test_a_box_that_is_empty_or_outside_is_refused(box: tuple[float, float, float, float]) -> None:
    with pytest.raises(RejectedError) as caught:
        clipped(box, SIZE_WH)
    assert caught.value.code == "prompt_invalid"


def test_a_box_that_reaches_beyond_the_image_is_clipped() -> None:
    assert clipped((-5, 10, 100, 20), SIZE_WH) == (0, 10, 60, 20)


def test_what_must_be_fetched_is_named_once() -> None:
    sources = [{"task_id": TASK, "mask_ids": [2]}, {"task_id": TASK, "mask_ids": [2]}, {"task_id": TASK}, {"image_url": "m.png"}]
    wanted = inputs_of([MaskSource.model_validate(source) for source in [*sources, {"polygon": [[0, 0], [1, 0], [1, 1]]}]])
    assert wanted.masks == (
        MasksRef(f"masks {TASK} 2", TASK, (2,)),
        MasksRef(f"masks {TASK} all", TASK, None),
    )
    assert wanted.blobs == (BlobRef("mask m.png", "m.png"),)


def test_a_mask_given_as_run_lengths_is_that_mask() -> None:
    source = MaskSource.model_validate({"rle": segmentation(SQUARE, SIZE_WH)})
    assert same(mask_from(source, job(), SIZE_WH), SQUARE)


def test_a_polygon_holds_the_pixels_whose_centres_it_holds() -> None:
    source = MaskSource.model_validate({"polygon": [[20, 5], [30, 5], [30, 15], [20, 15]]})
    assert same(mask_from(source, job(), SIZE_WH), SQUARE)


def test_a_polygon_beyond_the_image_is_clipped() -> None:
    source = MaskSource.model_validate({"polygon": [[-1e5, 30], [1e5, 30], [1e5, 1e5], [-1e5, 1e5]]})
    assert mask_from(source, job(), SIZE_WH).box_xyxy == (0, 30, 60, 40)


def test_an_image_is_inside_above_127() -> None:
    pixels_hwc = np.full((40, 60, 3), 127, dtype=np.uint8)
    pixels_hwc[5:15, 20:30] = 128
    images = {"mask m.png": SourceImage(pixels_hwc, "h", "m.png")}
    source = MaskSource.model_validate({"image_url": "m.png"})
    assert same(mask_from(source, job(images=images), SIZE_WH), SQUARE)


def read_as_mask(data: bytes) -> Mask:
    """What these bytes mean as the image of a mask."""
    read_image = decode(data, bytes_max=1_000_000, pixels_max=1_000_000)
    image = SourceImage(read_image.pixels_hwc, "h", "m.png", read_image.alpha_hw)
    return mask_from(MaskSource.model_validate({"image_url": "m.png"}), job(images={"mask m.png": image}), SIZE_WH)


def test_a_mask_image_that_maskd_has_drawn_is_the_union_of_its_masks() -> None:
    dark, bright = SQUARE, pack(np.ones((3, 4), dtype=np.bool_), (1, 30))
    union = np.logical_or(dark.window_hw((0, 0, *SIZE_WH)), bright.window_hw((0, 0, *SIZE_WH)))
    drawn = mask_png([dark, bright], [(0, 0, 90), (250, 200, 0)], SIZE_WH)
    assert same(read_as_mask(drawn), pack(union))
    assert not read_as_mask(mask_png([], [], SIZE_WH)).bits.size


def test_of_an_image_with_transparency_the_alpha_alone_decides() -> None:
    rgba = np.full((40, 60, 4), 255, dtype=np.uint8)
    rgba[..., 3] = SQUARE.window_hw((0, 0, *SIZE_WH)) * np.uint8(200)
    file = io.BytesIO()
    Image.fromarray(rgba).save(file, "PNG")
    assert same(read_as_mask(file.getvalue()), SQUARE)


def test_a_mask_image_of_another_size_is_refused() -> None:
    images = {"mask m.png": SourceImage(np.zeros((4, 6, 3), dtype=np.uint8), "h", "m.png")}
    with pytest.raises(RejectedError, match="6 x 4 pixels; it must have the 60 x 40"):
        mask_from(MaskSource.model_validate({"image_url": "m.png"}), job(images=images), SIZE_WH)


def dataset(*masks: Mask) -> dict[str, Any]:
    return {"annotations": [{"id": index + 1, "segmentation": segmentation(mask, SIZE_WH)} for index, mask in enumerate(masks)]}


def test_masks_of_an_earlier_task_come_by_id_and_together_they_are_their_union() -> None:
    other = pack(np.ones((2, 2), dtype=np.bool_), (0, 0))
    masks = {f"masks {TASK} 2,1": dataset(SQUARE, other)}
    source = MaskSource.model_validate({"task_id": TASK, "mask_ids": [2, 1]})
    assert [mask.area for mask in masks_of(source, job(masks=masks), SIZE_WH)] == [4, 100]
    assert mask_from(source, job(masks=masks), SIZE_WH).area == 104


def test_an_id_that_the_earlier_task_does_not_have_is_mask_missing() -> None:
    source = MaskSource.model_validate({"task_id": TASK, "mask_ids": [7]})
    with pytest.raises(RejectedError, match="has no mask 7; it has 1") as caught:
        mask_from(source, job(masks={f"masks {TASK} 7": dataset(SQUARE)}), SIZE_WH)
    assert caught.value.code == "mask_missing"


@pytest.mark.parametrize(
    "rle",
    [
        {"size": [60, 40], "counts": [2400]},
        {"size": [40, 60], "counts": [2399]},
        {"size": [40, 60], "counts": [10**30]},
        {"size": [40, 60], "counts": "ooooooooooooooooooooooooo"},
        {"size": [40, 60], "counts": "é"},
        {"size": [40, 60], "counts": ""},
    ],
)
def test_run_lengths_that_are_not_a_mask_of_this_image_are_refused(rle: dict[str, Any]) -> None:
    with pytest.raises(RejectedError) as caught:
        mask_from(MaskSource.model_validate({"rle": rle}), job(), SIZE_WH)
    assert caught.value.code == "prompt_invalid"


def test_an_empty_mask_is_no_prompt() -> None:
    wanted = ObjectPrompt.model_validate({"mask": {"rle": {"size": [40, 60], "counts": [2400]}}})
    with pytest.raises(RejectedError, match="empty"):
        prompts_of([wanted], job())


MASK_IMAGES = [{"image_url": f"{index}.png"} for index in range(9)]


@pytest.mark.parametrize(
    ("handler", "params"),
    [
        (segment_visual, {"objects": [{"mask": mask} for mask in MASK_IMAGES]}),
        (remove_object, {"masks": MASK_IMAGES[:5], "objects": [{"mask": mask} for mask in MASK_IMAGES[5:]]}),
        (paint_masks, {"layers": [{"mask": mask} for mask in MASK_IMAGES]}),
        (combine_masks, {"masks": MASK_IMAGES}),
    ],
)
def test_masks_stand_in_no_more_images_than_a_task_may_have_decoded(handler: Handler, params: dict[str, Any]) -> None:
    request = Request("kind", "a.jpg", None, params)
    with pytest.raises(RejectedError, match="There are 9 images of masks; at most 8 are allowed") as caught:
        handler.parse(request, Limits())
    assert caught.value.code == "params_invalid"
    handler.parse(request, Limits(mask_images_max=9))


def test_the_same_image_of_a_mask_counts_once() -> None:
    combine_masks.parse(Request("combine_masks", None, None, {"masks": MASK_IMAGES[:1] * 20}), Limits())


@pytest.mark.parametrize("objects", [[], None])
def test_no_objects_beside_masks_or_points_are_no_mistake(objects: Any) -> None:
    polygon = {"polygon": [[0, 0], [2, 0], [2, 2]]}
    wish = remove_object.parse(Request("remove_object", "a.jpg", None, {"objects": objects, "masks": [polygon]}), Limits())
    assert (wish.region.objects, len(wish.region.masks)) == ((), 1)
    assert len(visual({"objects": objects, "points": [[1, 2]]}).objects) == 1
    with pytest.raises(RejectedError, match="give points, boxes, objects or masks"):
        remove_object.parse(Request("remove_object", "a.jpg", None, {"objects": objects}), Limits())
