"""What every kind owes the daemon, with every engine that needs no weights, or with none where the kind needs none."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask
from support.kinds import (
    ENGINES,
    EXAMPLES,
    NO_ENGINE,
    SERVES,
    answers,
    blob,
    done,
    example_of,
    job_of,
    models_of,
    never_stop,
    source,
)

from handlers.base import Handler, Job, Limits, RejectedError, Request, Result
from handlers.registry import checked, discover
from models.base import Models, StoppedError

KINDS = discover()
SEGMENTING = [(kind, engine) for kind in sorted(KINDS) for engine in ENGINES if kind.startswith("segment_")]
SEGMENTING = [(kind, engine) for kind, engine in SEGMENTING if SERVES[engine] >= KINDS[kind].ROLES]
PAINTING = [
    ("remove_object", "classical"),
    ("remove_object", "mock"),
    ("fill_object", "mock"),
    ("replace_background", "classical"),
]
PAIRS = [*SEGMENTING, *PAINTING]
UNAIDED = [(kind, NO_ENGINE) for kind in sorted(KINDS) if not KINDS[kind].ROLES]
WITH_MASKS = pytest.mark.parametrize("pair", [*PAIRS, ("combine_masks", NO_ENGINE)], ids="-".join, indirect=True)
WITH_ENGINES = pytest.mark.parametrize("pair", SEGMENTING, ids="-".join, indirect=True)
COLUMNS = {"mask_image_url", "masks_url", "result_image_url"}


@pytest.fixture(params=[*PAIRS, *UNAIDED], ids="-".join)
def pair(request: pytest.FixtureRequest) -> tuple[str, str]:
    """A kind and an engine that serves it."""
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def kind(pair: tuple[str, str]) -> str:
    return pair[0]


@pytest.fixture
def models(pair: tuple[str, str]) -> Models:
    return models_of(pair[1])


@pytest.fixture
def handler(kind: str) -> Handler:
    return KINDS[kind]


@pytest.fixture
def job(kind: str, handler: Handler) -> Job:
    return example_of(kind, handler)


def annotations_of(result: Result) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(blob(result, "masks_url"))["annotations"]
    return found


def test_kinds_are_found_by_their_file_names() -> None:
    assert {"segment_visual", "segment_everything"} <= set(KINDS)
    assert not {kind for kind in KINDS if kind.startswith("_")} | set(KINDS) & {"base", "registry"}


def test_a_file_that_is_no_handler_is_named_with_what_it_lacks() -> None:
    with pytest.raises(TypeError, match=r"handlers/odd\.py is not a handler: it lacks parse, .*ROLES.*BATCH_MAX"):
        checked(ModuleType("handlers.odd"))


def test_every_kind_has_an_example() -> None:
    assert set(KINDS) <= set(EXAMPLES)


def test_a_task_becomes_files_labels_and_facts(handler: Handler, job: Job, models: Models) -> None:
    result = done(handler, job, models)
    assert {file.column for file in result.blobs} <= COLUMNS
    named = {"engine", "model_id", "device", "image_width", "image_height", "warnings"}
    assert named <= set(result.metadata)
    assert (result.metadata["image_width"], result.metadata["image_height"]) == (600, 400)
    json.dumps([result.labels, result.metadata], allow_nan=False)


@WITH_MASKS
def test_masks_are_listed_with_how_sure_the_engine_is(handler: Handler, job: Job, models: Models) -> None:
    result = done(handler, job, models)
    assert result.labels
    assert {"count", "confidence", "embedding_cached"} <= set(result.metadata)


@WITH_MASKS
def test_the_png_holds_the_ids_of_the_coco_masks_small_ones_on_top(handler: Handler, job: Job, models: Models) -> None:
    result = done(handler, job, models)
    ids_hw = np.asarray(Image.open(io.BytesIO(blob(result, "mask_image_url"))))
    expected_hw = np.zeros((400, 600), dtype=np.uint8)
    for annotation in sorted(annotations_of(result), key=lambda annotation: -annotation["area"]):
        expected_hw[coco_mask.decode(annotation["segmentation"]).astype(bool)] = annotation["id"]
    assert (ids_hw == expected_hw).all()


@WITH_MASKS
def test_labels_agree_with_the_coco_masks(handler: Handler, job: Job, models: Models) -> None:
    result = done(handler, job, models)
    for label, annotation in zip(result.labels, annotations_of(result), strict=True):
        x, y, width, height = annotation["bbox"]
        assert (label["id"], label["area"], label["score"]) == (annotation["id"], annotation["area"], annotation["score"])
        assert label["box"] == [x, y, x + width, y + height]
        assert label["object"] == annotation.get("object")


@WITH_MASKS
def test_the_colours_of_the_labels_are_those_of_the_png(handler: Handler, job: Job, models: Models) -> None:
    result = done(handler, job, models)
    image = Image.open(io.BytesIO(blob(result, "mask_image_url")))
    palette = image.getpalette() or []
    for label in result.labels:
        red, green, blue = palette[3 * label["id"] : 3 * label["id"] + 3]
        assert label["color"] == f"#{red:02X}{green:02X}{blue:02X}"


def test_the_same_task_leaves_the_same_bytes(handler: Handler, job: Job, models: Models) -> None:
    first, second = done(handler, job, models), done(handler, job, models)
    assert [file.data for file in first.blobs] == [file.data for file in second.blobs]


@WITH_ENGINES
def test_the_second_task_on_an_image_finds_it_embedded(handler: Handler, job: Job, models: Models) -> None:
    assert [done(handler, job, models).metadata["embedding_cached"] for _ in range(2)] == [False, True]


def test_a_bad_job_does_not_spoil_its_neighbours(handler: Handler, job: Job, models: Models) -> None:
    good = handler.prepare(job, models)
    first, bad, last = handler.run([good, None, good], models, never_stop)
    assert isinstance(bad, Exception)
    assert handler.finish(job, first).labels == handler.finish(job, last).labels


def test_run_answers_every_job_in_order(handler: Handler, job: Job, models: Models) -> None:
    assert len(answers(handler, [job] * 3, models)) == 3
    assert list(answers(handler, [], models)) == []


def test_a_stop_ends_the_batch(handler: Handler, job: Job, models: Models) -> None:
    def stop() -> None:
        raise StoppedError

    with pytest.raises(StoppedError):
        handler.run([handler.prepare(job, models)], models, stop)


def test_an_unknown_parameter_is_answered_with_the_nearest_known_one(kind: str, handler: Handler) -> None:
    known = next(iter(EXAMPLES[kind]))
    with pytest.raises(RejectedError) as caught:
        handler.parse(Request(kind, "a.jpg", None, {known + "x": 1}), Limits())
    assert caught.value.code == "params_invalid"
    assert f'"{known}x"' in caught.value.message
    assert f'did you mean "{known}"?' in caught.value.message


def test_a_task_without_an_image_is_refused(handler: Handler, job: Job) -> None:
    with pytest.raises(RejectedError) as caught:
        handler.prepare(Job("task", job.params), models_of("mock"))
    assert caught.value.code == "image_missing"


def test_preparing_leaves_the_image_as_it_is(handler: Handler, job: Job, models: Models) -> None:
    done(handler, job, models)
    assert (source().pixels_hwc == job.image.pixels_hwc).all() if job.image else False


@pytest.mark.parametrize(
    "params", [{"points": [[600, 10]]}, {"boxes": [[700, 0, 800, 10]]}, {"objects": [{"box": [9, 9, 5, 5]}]}]
)
def test_a_prompt_outside_the_image_is_refused_before_any_model_runs(params: Mapping[str, Any]) -> None:
    visual = KINDS["segment_visual"]
    with pytest.raises(RejectedError) as caught:
        visual.prepare(job_of(visual, params), models_of("mock"))
    assert caught.value.code == "prompt_invalid"


@pytest.mark.parametrize("engine", ENGINES)
def test_with_multimask_the_best_is_drawn_and_all_are_kept(engine: str) -> None:
    models = models_of(engine)
    visual = KINDS["segment_visual"]
    params = {"objects": [{"box": [70, 10, 480, 385]}, {"points": [[280, 150]]}], "multimask": True}
    result = done(visual, job_of(visual, params, "cup"), models)
    ids_hw = np.asarray(Image.open(io.BytesIO(blob(result, "mask_image_url"))))
    assert set(np.unique(ids_hw)) <= {0, 1, 2}
    assert [annotation["object"] for annotation in annotations_of(result)] == [0, 1, 0, 0, 1, 1]
    assert [label["color"] is not None for label in result.labels] == [True, True, False, False, False, False]
    assert (result.metadata["count"], {label["label"] for label in result.labels}) == (2, {"cup"})


@pytest.mark.parametrize("engine", ENGINES)
def test_a_mask_of_an_earlier_task_can_be_the_prompt(engine: str) -> None:
    models = models_of(engine)
    visual, task_id = KINDS["segment_visual"], "0b0c6e5e-6f3f-4a52-9a0d-3a5a3a6d7b11"
    earlier = done(visual, job_of(visual, {"boxes": [[70, 10, 480, 385]]}), models)
    job = job_of(visual, {"objects": [{"mask": {"task_id": task_id}}]})
    (wanted,) = visual.inputs(job.params).masks
    job = Job(job.task_id, job.params, job.image, masks={wanted.name: json.loads(blob(earlier, "masks_url"))})
    (before,), (after,) = earlier.labels, done(visual, job, models).labels
    assert after["area"] > 0
    if engine in ("classical", "mock"):  # the weights of networks are random here: they refine nothing
        assert abs(after["area"] - before["area"]) < 0.15 * before["area"]


def test_everything_says_how_finely_it_looked_and_which_thresholds_meant_nothing() -> None:
    everything = KINDS["segment_everything"]
    result = done(everything, job_of(everything, {"points_per_side": 8, "pred_iou_thresh": 0.5}), models_of("classical"))
    assert result.metadata["points_per_side"] == 8
    assert result.metadata["warnings"] == ["pred_iou_thresh was not applied: this engine gives no predicted_iou"]


@pytest.mark.parametrize("engine", ENGINES)
def test_nothing_found_is_a_result_with_an_empty_mask(engine: str) -> None:
    models = models_of(engine)
    everything = KINDS["segment_everything"]
    result = done(everything, job_of(everything, {"min_mask_area": 240_001}), models)
    assert (result.labels, annotations_of(result), result.metadata["confidence"]) == ([], [], None)
    assert Image.open(io.BytesIO(blob(result, "mask_image_url"))).size == (600, 400)
