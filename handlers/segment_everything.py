"""All masks of an image, largest first.

Asks for nothing; `points_per_side`, `pred_iou_thresh`, `stability_score_thresh`, `box_nms_thresh`, `min_mask_area` and
`crop_layers` say how finely to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from handlers._instances import Facts, Instance, facts_of, result
from handlers._params import Share, Strict, check_text, read
from handlers._prompts import source_of, view_of
from handlers._together import together
from handlers.base import Inputs, Job, Limits, RejectedError, Request, Result, progress_of
from models.base import EverythingOptions, EverythingSegmenter, Later, Mask, Model, Models, Role, Stop, View

ROLES = frozenset({Role.EVERYTHING})
BATCH_MAX = 1
TIMEOUT_FACTOR = 2.0

UNNAMED = "region"
POINTS_PER_SIDE = 32
POINTS_PER_SIDE_SLOW = 16
CROP_LAYERS_MAX = 3
SLOW = ("mobilesam", "cpu")
"""The engine and device whose decoder makes a grid of 32 points a side take minutes."""


class EverythingParams(Strict):
    """The kind's `params`; None leaves the choice to the engine's default."""

    points_per_side: Annotated[int, Field(ge=1)] | None = None
    pred_iou_thresh: Share | None = None
    stability_score_thresh: Share | None = None
    box_nms_thresh: Share | None = None
    min_mask_area: Annotated[int, Field(ge=0)] | None = None
    crop_layers: Annotated[int, Field(ge=0, le=CROP_LAYERS_MAX)] | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What `parse` makes of a request."""

    params: EverythingParams
    label: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one job."""

    view: View
    params: EverythingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """The masks, still to be enlarged, how finely was looked, and who found them."""

    masks: Later
    points_per_side: int
    facts: Facts


def parse(request: Request, limits: Limits) -> Wish:
    """The row's wish; raises RejectedError."""
    params = read(EverythingParams, request.params)
    if (params.points_per_side or 0) > limits.points_per_side_max:
        raise RejectedError("params_invalid", f"points_per_side may be at most {limits.points_per_side_max}.")
    return Wish(params, check_text(request.text_prompt, limits) or UNNAMED)


def inputs(params: Wish) -> Inputs:
    """The source only."""
    return Inputs()


def prepare(job: Job, models: Models) -> Prepared:
    """The image and the wish."""
    wish: Wish = job.params
    return Prepared(view_of(job, models, _model(models)), wish.params)


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer | Exception]:
    """Embed the images together, then look for everything in one after the other."""
    return together(prepared, lambda jobs: _answers(jobs, models, stop), stop)


def finish(job: Job, raw: Answer) -> Result:
    """Draw all masks, small ones on top."""
    wish: Wish = job.params
    masks = [mask for mask in raw.masks() if mask.bits.size]
    instances = [Instance(mask, wish.label) for mask in masks]
    extra = {"points_per_side": raw.points_per_side, "warnings": _warnings(wish.params, masks)}
    return result(job, instances, source_of(job).size_wh, raw.facts, **extra)


def _model(models: Models) -> EverythingSegmenter:
    assert models.everything is not None, "the pool holds this kind's roles"
    return models.everything


def _answers(jobs: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer]:
    model, answers = _model(models), []
    embedded = models.embeddings.get(model, [job.view for job in jobs])
    for job, (embedding, cached) in zip(jobs, embedded, strict=True):
        options = replace(options_of(job.params, model), progress=progress_of(stop))
        answers.append(Answer(model.everything(embedding, options, stop), options.points_per_side, facts_of(model, cached)))
    return answers


def options_of(params: EverythingParams, model: Model) -> EverythingOptions:
    """How finely that engine looks when asked so."""
    default = POINTS_PER_SIDE_SLOW if (model.engine, model.device) == SLOW else POINTS_PER_SIDE
    return EverythingOptions(**{"points_per_side": default} | params.model_dump(exclude_none=True))


def _warnings(params: EverythingParams, masks: Sequence[Mask]) -> list[str]:
    """Thresholds that were asked for and mean nothing to an engine that gives no such score."""
    asked = (("pred_iou_thresh", "predicted_iou"), ("stability_score_thresh", "stability_score"))
    return [
        f"{threshold} was not applied: this engine gives no {score}"
        for threshold, score in asked
        if getattr(params, threshold) is not None and masks and all(getattr(mask, score) is None for mask in masks)
    ]
