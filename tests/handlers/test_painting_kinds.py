"""remove_object, fill_object and replace_background: what may be asked, what stays untouched, and what is repeatable."""

from __future__ import annotations

import io
import json
import tracemalloc
import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from support.engines import never_stop
from support.kinds import SPOON, answers, blob, done, job_of, models_of, source

from handlers import _repaint, fill_object, remove_object, replace_background
from handlers._region import grown
from handlers._repaint import blend, paste, share_in
from handlers.base import Handler, Job, Limits, RejectedError, Request, Result, SourceImage, UnservedError
from handlers.fill_object import surroundings
from handlers.replace_background import blurred, covering, lay
from models.base import Mask, Patch, pack

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


@pytest.mark.parametrize(("size_wh", "wanted_wh"), [((256, 1), (10, 300)), ((1, 256), (300, 10)), ((256, 1), (600, 400))])
def test_a_thin_image_behind_covers_the_whole_too(size_wh: tuple[int, int], wanted_wh: tuple[int, int]) -> None:
    thin = np.full((size_wh[1], size_wh[0], 3), 77, dtype=np.uint8)
    assert (covering(thin, wanted_wh) == 77).all()
    assert covering(thin, wanted_wh).shape == (wanted_wh[1], wanted_wh[0], 3)


@pytest.fixture
def narrow_strips(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Call it with True for strips of some rows, with False for one of the whole image."""
    return lambda narrow: monkeypatch.setattr(_repaint, "STRIP_PIXELS", 300 if narrow else 1 << 30)


def blob_in(width: int, height: int) -> Mask:
    """Two ellipses, one of them cut by the border."""
    y, x = np.ogrid[:height, :width]
    inside = ((y - height / 2) / (height / 4)) ** 2 + ((x - width / 3) / (width / 5)) ** 2 < 1
    return pack(inside | (((y - height) / (height / 5)) ** 2 + ((x - width) / (width / 4)) ** 2 < 1))


@pytest.mark.parametrize("sigma", [0.7, 4.0, 5.0, 30.0])
def test_in_strips_all_is_as_in_one(narrow_strips: Callable[[bool], None], sigma: float) -> None:
    rng = np.random.default_rng(3)
    image_hwc, other_hwc = (rng.integers(0, 256, (130, 90, 3), dtype=np.uint8) for _ in range(2))
    alpha_hw = rng.integers(0, 256, (130, 90), dtype=np.uint8)
    for array in (image_hwc, alpha_hw):
        array.setflags(write=False)
    mask = blob_in(90, 130)
    found = []
    for narrow in (False, True):
        narrow_strips(narrow)
        soft_hwc, laid_hwc, pasted_hwc, seen_hw = (
            blurred(image_hwc, mask, sigma),
            other_hwc.copy(),
            image_hwc.copy(),
            alpha_hw.copy(),
        )
        lay(SourceImage(image_hwc, "h", "a", alpha_hw), mask, laid_hwc)
        paste(pasted_hwc, mask, [Patch((3, 5, 90, 128), other_hwc[5:128, 3:])], 3, seen_hw)
        found.append((soft_hwc, laid_hwc, pasted_hwc, seen_hw))
    for whole, in_strips in zip(*found, strict=True):
        assert np.abs(whole.astype(int) - in_strips).max() <= 1


def test_a_blur_in_strips_is_a_weighted_mean(narrow_strips: Callable[[bool], None]) -> None:
    import cv2

    narrow_strips(True)
    image_hwc = np.random.default_rng(4).integers(0, 256, (130, 90, 3), dtype=np.uint8)
    mask = blob_in(90, 130)
    behind_hw = 1 - mask.window_hw((0, 0, 90, 130)).astype(np.float32)
    sums_hwc = cv2.GaussianBlur(image_hwc * behind_hw[:, :, None], (0, 0), 3.0)
    expected_hwc = sums_hwc / np.maximum(cv2.GaussianBlur(behind_hw, (0, 0), 3.0), 1e-6)[:, :, None]
    outside_hw = behind_hw > 0
    assert np.abs(blurred(image_hwc, mask, 3.0)[outside_hw] - expected_hwc[outside_hw]).max() <= 1


@pytest.mark.parametrize("width", [1, 2, 17])
def test_a_blend_is_rounded_and_exact_at_both_ends(width: int) -> None:
    rng = np.random.default_rng(6)
    old_hwc, new_hwc = (rng.integers(0, 256, (50, width, 3), dtype=np.uint8) for _ in range(2))
    share_hw = rng.choice(np.array([0, 1, 100, 254, 255], dtype=np.uint8), (50, width))
    share = share_hw[:, :, None].astype(int)
    expected_hwc = (old_hwc * (255 - share) + new_hwc * share + 127) // 255
    for into_hwc in (old_hwc.copy(), new_hwc.copy()):
        other_hwc = into_hwc if (into_hwc == new_hwc).all() else new_hwc
        blend(into_hwc if other_hwc is new_hwc else old_hwc, other_hwc, share_hw, into_hwc)
        assert (into_hwc == expected_hwc).all()


def test_twelve_megapixels_are_painted_on_and_blurred_in_little_memory() -> None:
    width, height = 4000, 3000
    image_hwc = np.full((height, width, 3), 90, dtype=np.uint8)
    canvas_hwc, mask = image_hwc.copy(), blob_in(width, height)
    source = SourceImage(image_hwc, "h", "a", np.full((height, width), 128, dtype=np.uint8))
    works: list[tuple[Callable[[], object], int]] = [
        (lambda: lay(source, mask, canvas_hwc), 60),
        (lambda: paste(canvas_hwc, mask, [Patch((0, 0, width, height), image_hwc)], 3), 60),
        (lambda: blurred(image_hwc, mask, 3.0), 180),
    ]
    for work, most_mb in works:
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < most_mb * 1e6


def test_a_mask_without_any_rim_overflows_nothing() -> None:
    everything = pack(np.ones((20, 30), dtype=np.bool_))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (share_in(everything, (0, 0, 30, 20), (30, 20), 3) == 255).all()
        laid_hwc = np.zeros((20, 30, 3), dtype=np.uint8)
        lay(SourceImage(np.full((20, 30, 3), 9, dtype=np.uint8), "h", "a"), everything, laid_hwc)
    assert (laid_hwc == 9).all()


def see_through(job: Job) -> tuple[Job, np.ndarray[Any, Any]]:
    """The job with a left half of which half is seen, as decoding gives it: laid on white. And its alpha."""
    assert job.image is not None
    alpha_hw = np.full(job.image.pixels_hwc.shape[:2], 255, dtype=np.uint8)
    alpha_hw[:, :350] = 0
    alpha_hw[:260, :350] = 128
    share = alpha_hw[:, :, None] / 255
    laid_hwc = np.rint(job.image.pixels_hwc * share + 255 * (1 - share)).astype(np.uint8)
    return replace_image(job, replace(job.image, pixels_hwc=laid_hwc, alpha_hw=alpha_hw)), alpha_hw


def replace_image(job: Job, image: SourceImage) -> Job:
    return Job(job.task_id, job.params, image, job.images, job.masks)


def test_through_what_stays_and_is_transparent_the_new_background_is_seen() -> None:
    job, alpha_hw = see_through(job_of(replace_background, {**MASK, "color": "#0A1B2C"}))
    result = done(replace_background, job, models_of("classical"))
    share = alpha_hw[:, :, None] / 255
    expected_hwc = source().pixels_hwc * share + np.array([10, 27, 44]) * (1 - share)
    stays = used_mask(result)
    assert {0, 128, 255} == set(alpha_hw[stays].tolist())
    assert np.abs(pixels(result)[stays] - expected_hwc[stays]).max() <= 2


def test_what_is_filled_is_opaque_and_what_is_around_stays_transparent() -> None:
    job, alpha_hw = see_through(job_of(fill_object, {**MASK, "steps": 2, "dilate_kernel_size": 0}, "a rose"))
    result = done(fill_object, job, models_of("mock"))
    painted, inside = pixels(result), used_mask(result)
    assert (painted[inside][:, 3] == 255).all()
    assert (painted[~inside][:, 3] == alpha_hw[~inside]).all()
    assert alpha_hw.min() == 0, "the source is as it was"


def test_removing_what_is_transparent_leaves_it_so_and_says_so() -> None:
    job, alpha_hw = see_through(job_of(remove_object, MASK))
    result = done(remove_object, job, models_of("mock"))
    assert (pixels(result)[:, :, 3] == alpha_hw).all()
    assert result.metadata["warnings"] == [remove_object.TRANSPARENT]


@pytest.mark.parametrize(("kind", "params", "text"), WISHES)
def test_a_side_that_the_file_cannot_have_is_refused_before_the_work(kind: str, params: dict[str, Any], text: str | None) -> None:
    job = job_of(HANDLERS[kind], {**params, "format": "webp"}, text)
    wide = replace_image(job, SourceImage(np.zeros((2, 16_384, 3), dtype=np.uint8), "h", "wide.png"))
    with pytest.raises(RejectedError, match="WEBP holds at most 16383 pixels a side"):
        HANDLERS[kind].prepare(wide, models_of("mock"))


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
