"""remove_object, fill_object and replace_background: what may be asked, what stays untouched, and what is repeatable."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from support.engines import never_stop
from support.kinds import SPOON, answers, blob, done, job_of, models_of, source

from handlers import fill_object, remove_object, replace_background
from handlers._region import grown
from handlers.base import Handler, Job, Limits, RejectedError, Request, Result, UnservedError
from handlers.fill_object import surroundings
from handlers.replace_background import blurred, covering
from models.base import pack

HANDLERS: Mapping[str, Any] = {
    "remove_object": remove_object,
    "fill_object": fill_object,
    "replace_background": replace_background,
}
MASK = {"masks": [{"polygon": SPOON}]}
WISHES: list[tuple[str, dict[str, Any], str | None]] = [
    ("remove_object", MASK, None),
    ("fill_object", {**MASK, "steps": 2}, "a red rose"),
    ("replace_background", {**MASK, "steps": 2}, "a beach"),
    ("replace_background", {**MASK, "color": "#0A1B2C"}, None),
    ("replace_background", {**MASK, "blur": 12}, None),
]


def pixels(result: Result) -> np.ndarray[Any, Any]:
    return np.asarray(Image.open(io.BytesIO(blob(result, "result_image_url"))))


def used_mask(result: Result) -> np.ndarray[Any, Any]:
    """The mask that the result says was used, bool (height, width)."""
    annotations = json.loads(blob(result, "masks_url"))["annotations"]
    return coco_mask.decode(annotations[0]["segmentation"]).astype(bool)  # type: ignore[no-any-return]


@pytest.mark.parametrize(("kind", "params", "text"), WISHES)
def test_what_is_to_stay_is_the_same_bit_by_bit(kind: str, params: dict[str, Any], text: str | None) -> None:
    handler = HANDLERS[kind]
    result = done(handler, job_of(handler, params, text), models_of("mock"))
    stays = used_mask(result) if kind == "replace_background" else ~used_mask(result)
    assert (pixels(result)[stays] == source().pixels_hwc[stays]).all()
    changed = (pixels(result)[~stays] != source().pixels_hwc[~stays]).any(axis=1)
    assert changed.mean() > 0.5


@pytest.mark.parametrize("handler", [remove_object, fill_object])
def test_the_mask_that_was_used_is_the_dilated_one(handler: Handler) -> None:
    text = "a red rose"
    models = models_of("mock")
    tight, wide = (
        used_mask(done(handler, job_of(handler, {**MASK, "dilate_kernel_size": side}, text), models)).sum() for side in (0, 21)
    )
    assert wide > tight > 0


def test_dilating_in_the_box_is_dilating_the_whole() -> None:
    import cv2

    rng = np.random.default_rng(5)
    for _ in range(20):
        mask_hw = rng.random((40, 50)) > 0.95
        side = int(rng.integers(0, 12))
        expected_hw = cv2.dilate(mask_hw.astype(np.uint8), np.ones((side, side), np.uint8)) > 0 if side > 1 else mask_hw
        assert (grown(pack(mask_hw), side, (50, 40)).window_hw((0, 0, 50, 40)) == expected_hw).all()


@pytest.mark.parametrize(("kind", "params", "text"), WISHES[1:3])
def test_the_seed_is_told_and_decides(kind: str, params: dict[str, Any], text: str) -> None:
    handler, models = HANDLERS[kind], models_of("mock")
    first = done(handler, job_of(handler, params, text), models)
    again = done(handler, job_of(handler, {**params, "seed": first.metadata["seed"]}, text), models)
    other = done(handler, job_of(handler, {**params, "seed": 1 + first.metadata["seed"]}, text), models)
    assert (pixels(first) == pixels(again)).all()
    assert (pixels(first) != pixels(other)).any()
    assert first.metadata["steps"] == 2


def test_without_a_seed_a_task_has_its_own() -> None:
    job = job_of(fill_object, {**MASK, "steps": 2}, "a rose")
    seeds = [done(fill_object, replace_id(job, name), models_of("mock")).metadata["seed"] for name in ("a", "a", "b")]
    assert seeds[0] == seeds[1] != seeds[2]


def replace_id(job: Job, task_id: str) -> Job:
    return Job(task_id, job.params, job.image, job.images, job.masks)


def test_points_and_masks_are_one_region_and_the_segmenter_is_named() -> None:
    models = models_of("mock")
    both = done(remove_object, job_of(remove_object, {**MASK, "points": [[100, 100]]}), models)
    alone = done(remove_object, job_of(remove_object, MASK), models)
    assert both.metadata["segmenter"] == "mock"
    assert "segmenter" not in alone.metadata
    assert used_mask(both).sum() > used_mask(alone).sum()


def test_nothing_where_one_pointed_is_a_result_that_says_so() -> None:
    job = job_of(remove_object, MASK)
    (prepared,) = [remove_object.prepare(job, models_of("mock"))]
    empty = replace(prepared, region=replace(prepared.region, masks=()))
    (answer,) = remove_object.run([empty], models_of("mock"), never_stop)
    assert not isinstance(answer, Exception)
    result = remove_object.finish(job, answer)
    assert (pixels(result) == source().pixels_hwc).all()
    assert "nothing was found" in result.metadata["warnings"][0]


def test_an_image_behind_covers_the_whole_and_keeps_its_proportions() -> None:
    wide = np.zeros((100, 400, 3), dtype=np.uint8)
    wide[:, 150:250] = 255
    square = covering(wide, (80, 80))
    assert square.shape == (80, 80, 3)
    assert square.min() > 200, "only the middle is seen"


def test_a_blurred_background_takes_no_colour_from_what_stays() -> None:
    image_hwc = np.zeros((60, 90, 3), dtype=np.uint8)
    image_hwc[20:40, 30:60] = 255
    kept = pack(np.ones((20, 30), dtype=np.bool_), (30, 20))
    assert blurred(image_hwc, kept, 5.0).max() <= 1
    assert blurred(image_hwc, pack(np.zeros((0, 0), dtype=np.bool_)), 5.0).max() > 100


def test_what_the_model_sees_is_square_inside_the_image_and_larger_than_what_is_replaced() -> None:
    mask = pack(np.ones((40, 30), dtype=np.bool_), (10, 350))
    assert surroundings(mask, (600, 400), 128) == (0, 272, 128, 400)
    assert surroundings(mask, (600, 400), 1000) == (0, 0, 600, 400)


def test_an_image_of_the_row_can_be_the_background() -> None:
    job = job_of(replace_background, {**MASK, "background_image_url": "uploads/u/astronaut.jpg"})
    (wanted,) = replace_background.inputs(job.params).blobs
    assert wanted.url == "uploads/u/astronaut.jpg"
    job = Job(job.task_id, job.params, job.image, {wanted.name: source("astronaut")})
    result = done(replace_background, job, models_of("classical"))
    assert pixels(result).shape == (400, 600, 3)
    assert (pixels(result)[used_mask(result)] == source().pixels_hwc[used_mask(result)]).all()


def test_a_host_that_cannot_paint_words_leaves_them_to_others() -> None:
    job = job_of(replace_background, MASK, "a beach")
    with pytest.raises(UnservedError, match="color, blur or background_image_url"):
        replace_background.prepare(job, models_of("classical"))


def test_jobs_of_one_batch_are_answered_as_if_alone() -> None:
    models = models_of("mock")
    jobs = [job_of(fill_object, {**MASK, "seed": seed, "steps": 2}, text) for seed, text in ((1, "a rose"), (2, "a car"))]
    together = [fill_object.finish(job, raw) for job, raw in zip(jobs, answers(fill_object, jobs, models), strict=True)]
    for job, result in zip(jobs, together, strict=True):
        assert (pixels(result) == pixels(done(fill_object, job, models))).all()


@pytest.mark.parametrize(
    ("kind", "params", "text", "code", "words"),
    [
        ("remove_object", {}, None, "prompt_invalid", "Point at something"),
        ("remove_object", {**MASK, "dilate_kernel_size": 256}, None, "params_invalid", "at most 255"),
        ("remove_object", {**MASK, "dilate_kernel_size": -1}, None, "params_invalid", "greater than or equal to 0"),
        ("remove_object", {"masks": [{"polygon": SPOON}] * 101}, None, "params_invalid", "at most 100"),
        ("remove_object", {**MASK, "quality": 0}, None, "params_invalid", "greater than or equal to 1"),
        ("remove_object", {**MASK, "format": "gif"}, None, "params_invalid", "PNG"),
        ("fill_object", MASK, None, "prompt_invalid", "set text_prompt"),
        ("fill_object", {**MASK, "steps": 51}, "a rose", "params_invalid", "at most 50"),
        ("fill_object", {**MASK, "seed": -1}, "a rose", "params_invalid", "greater than or equal to 0"),
        ("replace_background", MASK, None, "prompt_invalid", "exactly one of"),
        ("replace_background", {**MASK, "color": "#fff", "blur": 3}, None, "params_invalid", "exactly one of"),
        ("replace_background", {**MASK, "color": "reddish"}, None, "params_invalid", "#FF0000"),
        ("replace_background", {**MASK, "blur": 101}, None, "params_invalid", "at most 100"),
    ],
)
def test_what_cannot_be_done_is_refused_in_words(
    kind: str, params: Mapping[str, Any], text: str | None, code: str, words: str
) -> None:
    with pytest.raises(RejectedError) as caught:
        HANDLERS[kind].parse(Request(kind, "a.jpg", text, params), Limits())
    assert caught.value.code == code
    assert words in caught.value.message


def test_too_many_words_are_refused_before_anything_is_painted() -> None:
    with pytest.raises(RejectedError) as caught:
        fill_object.prepare(job_of(fill_object, MASK, "very " * 100 + "red"), models_of("mock"))
    assert caught.value.code == "prompt_invalid"
