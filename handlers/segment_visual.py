"""Clicks, boxes and masks to masks: one per object, or three with scores.

Asks for `objects: [{points?, box?, mask?}]`, or `points` / `boxes` for the simple case, and `multimask`. A text_prompt names
what is found.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handlers._instances import Facts, Instance, facts_of, result
from handlers._masks_in import inputs_of
from handlers._params import ObjectPrompt, VisualPrompts, check_mask_images, check_objects, check_text, read
from handlers._prompts import prompts_of, source_of, view_of
from handlers._together import together
from handlers.base import Inputs, Job, Limits, Request, Result
from models.base import Later, Models, Prompt, Role, Stop, View, VisualQuestion, VisualSegmenter

ROLES = frozenset({Role.VISUAL})
BATCH_MAX = 8
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

    view: View
    prompts: tuple[Prompt, ...]
    multimask: bool | None


@dataclass(frozen=True, slots=True)
class Answer:
    """Per object its masks, best first, still to be enlarged, and who found them."""

    masks: tuple[Later, ...]
    facts: Facts


def parse(request: Request, limits: Limits) -> Wish:
    """The row's wish; raises RejectedError."""
    params = read(VisualParams, request.params)
    objects = params.all_objects()
    check_objects(objects, limits)
    check_mask_images((wanted.mask for wanted in objects if wanted.mask is not None), limits)
    return Wish(tuple(objects), params.multimask, check_text(request.text_prompt, limits) or UNNAMED)


def inputs(params: Wish) -> Inputs:
    """The source, and the masks and images that stand for prompts."""
    return inputs_of(wanted.mask for wanted in params.objects if wanted.mask is not None)


def prepare(job: Job, models: Models) -> Prepared:
    """The image, and the prompts in its pixels; raises RejectedError when one lies outside."""
    wish: Wish = job.params
    prompts = tuple(prompts_of(wish.objects, job))
    return Prepared(view_of(job, models, _model(models)), prompts, wish.multimask)


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer | Exception]:
    """Embed the images and answer all prompts together."""
    return together(prepared, lambda jobs: _answers(jobs, models, stop), stop)


def finish(job: Job, raw: Answer) -> Result:
    """Draw the best mask per object; the others, with `multimask`, stand in the COCO file only."""
    wish: Wish = job.params
    found = [
        Instance(mask, wish.label, index, drawn=place == 0)
        for index, later in enumerate(raw.masks)
        for place, mask in enumerate(mask for mask in later() if mask.bits.size)
    ]
    instances = sorted(found, key=lambda instance: not instance.drawn)
    return result(job, instances, source_of(job).size_wh, raw.facts)


def _model(models: Models) -> VisualSegmenter:
    assert models.visual is not None, "the pool holds this kind's roles"
    return models.visual


def _answers(jobs: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer]:
    model = _model(models)
    embedded = models.embeddings.get(model, [job.view for job in jobs])
    questions = [
        VisualQuestion(embedding, prompt, job.multimask)
        for job, (embedding, _) in zip(jobs, embedded, strict=True)
        for prompt in job.prompts
    ]
    found = iter(model.segment(questions, stop))
    return [
        Answer(tuple(next(found) for _ in job.prompts), facts_of(model, cached))
        for job, (_, cached) in zip(jobs, embedded, strict=True)
    ]
