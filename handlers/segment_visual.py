"""Clicks, boxes and masks to masks: one per object, or three with scores.

Asks for `objects: [{points?, box?, mask?}]`, or `points` / `boxes` for the simple case, and `multimask`. A text_prompt names
what is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handlers._each import each
from handlers._instances import Facts, Instance, facts_of, result
from handlers._masks_in import inputs_of
from handlers._params import ObjectPrompt, VisualPrompts, check_objects, check_text, read
from handlers._prompts import prompts_of, source_of
from handlers.base import Inputs, Job, Limits, Request, Result, SourceImage
from models.base import Mask, Models, Prompt, Role, Stop

ROLES = frozenset({Role.VISUAL})
BATCH_MAX = 4
TIMEOUT_FACTOR = 1.0

UNNAMED = "object"


class VisualParams(VisualPrompts):
    """The kind's `params`."""

    multimask: bool | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What `parse` makes of a request."""

    objects: tuple[ObjectPrompt, ...]
    multimask: bool | None
    label: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one job."""

    image: SourceImage
    prompts: tuple[Prompt, ...]
    multimask: bool | None


@dataclass(frozen=True, slots=True)
class Answer:
    """Per object its masks, best first, and who found them."""

    masks: tuple[tuple[Mask, ...], ...]
    facts: Facts


def parse(request: Request, limits: Limits) -> Wish:
    """The row's wish; raises RejectedError."""
    params = read(VisualParams, request.params)
    objects = params.all_objects()
    check_objects(objects, limits)
    return Wish(tuple(objects), params.multimask, check_text(request.text_prompt, limits) or UNNAMED)


def inputs(params: Wish) -> Inputs:
    """The source, and the masks and images that stand for prompts."""
    return inputs_of(wanted.mask for wanted in params.objects if wanted.mask is not None)


def prepare(job: Job) -> Prepared:
    """The prompts in pixels of the image; raises RejectedError when one lies outside."""
    wish: Wish = job.params
    return Prepared(source_of(job), tuple(prompts_of(wish.objects, job)), wish.multimask)


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer | Exception]:
    """Embed each image once and answer its prompts."""
    return each(prepared, lambda job: _answer(job, models, stop), stop)


def finish(job: Job, raw: Answer) -> Result:
    """Draw the best mask per object; the others, with `multimask`, stand in the COCO file only."""
    wish: Wish = job.params
    found = [
        Instance(mask, wish.label, index, drawn=place == 0)
        for index, masks in enumerate(raw.masks)
        for place, mask in enumerate(mask for mask in masks if mask.bits.size)
    ]
    instances = sorted(found, key=lambda instance: not instance.drawn)
    return result(job, instances, source_of(job).size_wh, raw.facts)


def _answer(job: Prepared, models: Models, stop: Stop) -> Answer:
    model = models.visual
    assert model is not None, "the pool holds this kind's roles"
    embedding, cached = models.embeddings.get(model, job.image.content_hash, job.image.pixels_hwc)
    masks = model.segment(embedding, job.prompts, job.multimask, stop)
    return Answer(tuple(tuple(per_object) for per_object in masks), facts_of(model, cached))
