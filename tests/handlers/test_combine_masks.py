"""Combining masks: what comes out is what whole arrays would give, whatever the masks come from, and nothing is out of bounds."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from pycocotools import mask as coco_mask
from support.kinds import NO_ENGINE, answers, blob, done, models_of

from handlers import _edges, combine_masks
from handlers._edges import combined, edges_of_mask, edges_of_rle, filled
from handlers._rle import RleError, segmentation
from handlers.base import Job, Limits, RejectedError, Request, Result, SourceImage
from models.base import MaskHW, StoppedError, pack

SIZE_WH = (9, 7)
WHOLE = (0, 0, *SIZE_WH)
TASK = "0b0c6e5e-6f3f-4a52-9a0d-3a5a3a6d7b11"
OPERATIONS = {"union": np.logical_or, "intersection": np.logical_and, "difference": np.greater, "xor": np.logical_xor}
MODELS = models_of(NO_ENGINE)


def rectangle(x0: int, y0: int, x1: int, y1: int) -> MaskHW:
    mask_hw = np.zeros(SIZE_WH[::-1], dtype=np.bool_)
    mask_hw[y0:y1, x0:x1] = True
    return mask_hw


LEFT, MIDDLE = rectangle(0, 0, 5, 7), rectangle(3, 2, 7, 5)
NOTHING = rectangle(0, 0, 0, 0)


def rle(mask_hw: MaskHW) -> dict[str, Any]:
    return segmentation(pack(mask_hw), (mask_hw.shape[1], mask_hw.shape[0]))


def dataset(*masks: MaskHW) -> Mapping[str, Any]:
    """What an earlier task left behind."""
    annotations = [{"id": index + 1, "segmentation": rle(mask_hw)} for index, mask_hw in enumerate(masks)]
    return {"images": [{"width": SIZE_WH[0], "height": SIZE_WH[1]}], "annotations": annotations}


def source() -> SourceImage:
    return SourceImage(np.zeros((*SIZE_WH[::-1], 3), dtype=np.uint8), "h", "photo.jpg")


def job_of(
    masks: Sequence[Any], op: str = "union", earlier: Mapping[str, Any] | None = None, image: SourceImage | None = None
) -> Job:
    """A parsed task, with or without an image, as fetch hands it over."""
    request = Request("combine_masks", "uploads/u/photo.jpg" if image else None, None, {"masks": masks, "op": op})
    wish = combine_masks.parse(request, Limits())
    wanted = combine_masks.inputs(wish)
    assert wanted.source == (image is not None)
    return Job("task", wish, image, masks={ref.name: earlier or {} for ref in wanted.masks})


def mask_of(result: Result) -> MaskHW:
    """The one mask of a result, whole; all False where there is none."""
    document = json.loads(blob(result, "masks_url"))
    size_hw = (document["images"][0]["height"], document["images"][0]["width"])
    if not document["annotations"]:
        return np.zeros(size_hw, dtype=np.bool_)
    (annotation,) = document["annotations"]
    return coco_mask.decode(annotation["segmentation"]).astype(np.bool_)


def refused(masks: Sequence[Any], earlier: Mapping[str, Any] | None = None, image: SourceImage | None = None) -> RejectedError:
    """Why these masks cannot be combined."""
    with pytest.raises(RejectedError) as caught:
        done(combine_masks, job_of(masks, earlier=earlier, image=image), MODELS)
    return caught.value


SEVERAL = st.lists(arrays(np.bool_, SIZE_WH[::-1]), min_size=1, max_size=5)


@pytest.mark.parametrize("op", OPERATIONS)
@given(SEVERAL)
def test_edges_combine_as_whole_arrays_do(op: Any, masks: list[MaskHW]) -> None:
    expected_hw = masks[0]
    for mask_hw in masks[1:]:
        expected_hw = OPERATIONS[op](expected_hw, mask_hw)
    mask = filled(combined(op, [edges_of_mask(pack(mask_hw), SIZE_WH) for mask_hw in masks]), SIZE_WH)
    assert (mask.window_hw(WHOLE) == expected_hw).all()
    assert mask.box_xyxy == pack(expected_hw).box_xyxy
    assert (mask.bits == pack(expected_hw).bits).all()


@pytest.mark.parametrize("op", OPERATIONS)
@given(SEVERAL)
def test_edges_combined_bit_by_bit_for_want_of_memory_are_the_same(op: Any, masks: list[MaskHW]) -> None:
    edges = [edges_of_mask(pack(mask_hw), SIZE_WH) for mask_hw in masks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_edges, "EDGES_MAX", 3)
        bit_by_bit = combined(op, edges)
    assert (bit_by_bit == combined(op, edges)).all()


@given(st.lists(st.integers(0, 20), max_size=12))
def test_run_lengths_with_empty_runs_mean_the_same_mask(runs: list[int]) -> None:
    runs.append(SIZE_WH[0] * SIZE_WH[1] - sum(runs))
    if runs[-1] < 0:
        return
    given = {"size": list(SIZE_WH[::-1]), "counts": runs}
    expected_hw = np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(SIZE_WH).T
    assert (filled(combined("union", [edges_of_rle(given, SIZE_WH)]), SIZE_WH).window_hw(WHOLE) == expected_hw).all()


@pytest.mark.parametrize("counts", [[], [62], [70], [-1, 64], [10**30], [0, 10**18, 10**18], "0", "\x7f"])
def test_run_lengths_that_are_none_of_the_image_are_refused(counts: Any) -> None:
    with pytest.raises(RleError):
        edges_of_rle({"size": list(SIZE_WH[::-1]), "counts": counts}, SIZE_WH)


@pytest.mark.parametrize("op", OPERATIONS)
@pytest.mark.parametrize("image", [None, source()], ids=["without image", "with image"])
def test_all_masks_of_a_task_take_part_in_order(op: str, image: SourceImage | None) -> None:
    result = done(combine_masks, job_of([{"task_id": TASK}], op, dataset(LEFT, MIDDLE), image), MODELS)
    assert (mask_of(result) == OPERATIONS[op](LEFT, MIDDLE)).all()
    assert (result.metadata["op"], result.metadata["image_width"], result.metadata["image_height"]) == (op, *SIZE_WH)
    assert result.metadata["engine"] == "maskd"


def test_the_order_of_references_and_ids_says_what_is_subtracted_from_what() -> None:
    masks = [{"task_id": TASK, "mask_ids": [2, 1]}]
    assert (mask_of(done(combine_masks, job_of(masks, "difference", dataset(LEFT, MIDDLE)), MODELS)) == (MIDDLE & ~LEFT)).all()
    masks = [{"rle": rle(MIDDLE)}, {"task_id": TASK}]
    assert (mask_of(done(combine_masks, job_of(masks, "difference", dataset(LEFT)), MODELS)) == (MIDDLE & ~LEFT)).all()


def test_masks_may_come_from_everywhere_at_once() -> None:
    image = source()
    inside = SourceImage(np.repeat(rectangle(8, 0, 9, 7)[..., None] * np.uint8(255), 3, axis=2), "h", "m.png")
    masks = [{"polygon": [[0, 0], [2, 0], [2, 2], [0, 2]]}, {"image_url": "m.png"}, {"rle": rle(MIDDLE)}]
    job = job_of(masks, image=image)
    job.images = {"mask m.png": inside}
    expected_hw = rectangle(0, 0, 2, 2) | rectangle(8, 0, 9, 7) | MIDDLE
    assert (mask_of(done(combine_masks, job, MODELS)) == expected_hw).all()
    job = job_of(masks[:2])
    job.images = {"mask m.png": inside}
    assert (mask_of(done(combine_masks, job, MODELS)) == rectangle(0, 0, 2, 2) | rectangle(8, 0, 9, 7)).all()


def test_nothing_left_is_a_result_with_an_empty_mask() -> None:
    masks = [{"rle": rle(MIDDLE)}, {"rle": rle(MIDDLE)}]
    result = done(combine_masks, job_of(masks, "xor"), MODELS)
    assert (result.labels, result.metadata["count"], mask_of(result).any()) == ([], 0, False)


def test_a_task_that_found_nothing_counts_as_an_empty_mask() -> None:
    masks = [{"task_id": TASK}, {"rle": rle(MIDDLE)}]
    for op, expected_hw in (("union", MIDDLE), ("intersection", NOTHING), ("difference", NOTHING)):
        assert (mask_of(done(combine_masks, job_of(masks, op, dataset()), MODELS)) == expected_hw).all()


def test_the_text_names_the_result() -> None:
    request = Request("combine_masks", None, " façade ", {"masks": [{"rle": rle(LEFT)}]})
    result = done(combine_masks, Job("task", combine_masks.parse(request, Limits())), MODELS)
    assert [label["label"] for label in result.labels] == ["façade"]


def test_a_mask_that_the_task_has_not_is_missing() -> None:
    error = refused([{"task_id": TASK, "mask_ids": [1, 7]}], dataset(LEFT))
    assert (error.code, error.message) == ("mask_missing", f"Task {TASK} has no mask 7; it has 1.")


@pytest.mark.parametrize("image", [None, source()], ids=["without image", "with image"])
def test_a_mask_of_another_size_is_refused(image: SourceImage | None) -> None:
    other = {"size": [3, 3], "counts": [9]}
    error = refused([{"rle": rle(LEFT)}, {"rle": other}], image=image)
    assert error.code == "prompt_invalid"
    assert "its size is [3, 3], but the image has 7 rows and 9 columns" in error.message


def test_an_image_of_another_size_does_not_matter_where_the_masks_agree() -> None:
    image = SourceImage(np.zeros((3, 4, 3), dtype=np.uint8), "h", "smaller.jpg")
    masks = [{"polygon": [[0, 0], [2, 0], [2, 2], [0, 2]]}, {"task_id": TASK}, {"rle": rle(MIDDLE)}]
    result = done(combine_masks, job_of(masks, earlier=dataset(MIDDLE), image=image), MODELS)
    assert (mask_of(result) == rectangle(0, 0, 2, 2) | MIDDLE).all()
    assert mask_of(done(combine_masks, job_of(masks[:1], image=image), MODELS)).shape == (3, 4)


def test_run_lengths_beside_an_image_are_bounded_too() -> None:
    with pytest.raises(RejectedError) as caught:
        job_of([{"rle": {"size": [65535, 65535], "counts": [65535 * 65535]}}], image=source())
    assert caught.value.code == "image_too_large"


def test_of_many_masks_the_edges_that_are_held_are_counted_once_each() -> None:
    looked_at = 0

    class Counted(np.ndarray[Any, Any]):
        @property
        def size(self) -> int:  # type: ignore[override]
            nonlocal looked_at
            looked_at += 1
            return int(np.prod(self.shape))

    edges = [np.array([index, index + 1]).view(Counted) for index in range(0, 400, 2)]
    assert len(combined("union", edges)) == 400
    assert looked_at <= 2 * len(edges)


def test_polygons_alone_need_an_image() -> None:
    error = refused([{"polygon": [[0, 0], [2, 0], [2, 2]]}])
    assert (error.code, "source_image_url" in error.message) == ("image_missing", True)


def test_an_image_that_only_run_lengths_speak_of_is_not_larger_than_images_may_be() -> None:
    error = refused([{"rle": {"size": [65535, 65535], "counts": [65535 * 65535]}}])
    assert (error.code, "50,000,000" in error.message) == ("image_too_large", True)


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({}, "masks"),
        ({"masks": []}, "at least 1"),
        ({"masks": [{"rle": rle(LEFT)}] * 101}, "at most 100"),
        ({"masks": [{"rle": rle(LEFT)}], "op": "minus"}, "'union', 'intersection', 'difference' or 'xor'"),
        ({"masks": [{}]}, "exactly one of task_id"),
    ],
)
def test_parameters_that_mean_nothing_are_answered_with_a_sentence(params: Mapping[str, Any], says: str) -> None:
    with pytest.raises(RejectedError) as caught:
        combine_masks.parse(Request("combine_masks", None, None, params), Limits())
    assert caught.value.code == "params_invalid"
    assert says in caught.value.message


def test_a_stop_is_heard_between_masks() -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) > 3:
            raise StoppedError

    job = job_of([{"rle": rle(LEFT)}] * 9)
    with pytest.raises(StoppedError):
        combine_masks.run([combine_masks.prepare(job, MODELS)], MODELS, stop)
    assert len(answers(combine_masks, [job], MODELS)) == 1
