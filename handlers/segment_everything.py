"""All masks of an image, largest first.

Asks for nothing; `points_per_side`, `pred_iou_thresh`, `stability_score_thresh`, `box_nms_thresh` and `min_mask_area` say
how finely to look.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from handlers._each import each
from handlers._instances import Facts, Instance, facts_of, result
from handlers._params import Strict, check_text, read
from handlers._prompts import source_of
from handlers.base import Inputs, Job, Limits, RejectedError, Request, Result, SourceImage
from models.base import EverythingOptions, Mask, Model, Models, Role, Stop

ROLES = frozenset({Role.EVERYTHING})
BATCH_MAX = 1
TIMEOUT_FACTOR = 2.0

UNNAMED = "region"
POINTS_PER_SIDE = 32
POINTS_PER_SIDE_SLOW = 16
SLOW = ("mobilesam", "cpu")
"""The engine and device whose decoder makes a grid of 32 points a side take minutes."""

Share = Annotated[float, Field(ge=0, le=1)]


class EverythingParams(Strict):
    """The kind's `params`; None leaves the choice to the engine's default."""

    points_per_side: Annotated[int, Field(ge=1)] | None = None
    pred_iou_thresh: Share | None = None
    stability_score_thresh: Share | None = None
    box_nms_thresh: Share | None = None
    min_mask_area: Annotated[int, Field(ge=0)] | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What `parse` makes of a request."""

    params: EverythingParams
    label: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one job."""

    image: SourceImage
    params: EverythingParams


@dataclass(frozen=True, slots=True)
class Answer:
    """The masks, how finely was looked, and who found them."""

    masks: tuple[Mask, ...]
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


def prepare(job: Job) -> Prepared:
    """The image and the wish."""
    wish: Wish = job.params
    return Prepared(source_of(job), wish.params)


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer | Exception]:
    """Embed each image once and look for everything."""
    return each(prepared, lambda job: _answer(job, models, stop), stop)


def finish(job: Job, raw: Answer) -> Result:
    """Draw all masks, small ones on top."""
    wish: Wish = job.params
    instances = [Instance(mask, wish.label) for mask in raw.masks]
    extra = {"points_per_side": raw.points_per_side, "warnings": _warnings(wish.params, raw.masks)}
    return result(job, instances, source_of(job).size_wh, raw.facts, **extra)


def _answer(job: Prepared, models: Models, stop: Stop) -> Answer:
    model = models.everything
    assert model is not None, "the pool holds this kind's roles"
    embedding, cached = models.embeddings.get(model, job.image.content_hash, job.image.pixels_hwc)
    options = _options(job.params, model)
    masks = [mask for mask in model.everything(embedding, options, stop) if mask.bits.size]
    return Answer(tuple(masks), options.points_per_side, facts_of(model, cached))


def _options(params: EverythingParams, model: Model) -> EverythingOptions:
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
