"""What is pointed at, replaced by what the prompt says.

Asks for points, boxes, objects or masks, and text_prompt; `dilate_kernel_size` gives the new thing room, `seed`, `steps`,
`guidance_scale` and `negative_prompt` say how it is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from handlers._generating import GenerateParams, back, canvas, check_generating, check_words, seed_of
from handlers._images_out import picture_of
from handlers._instances import Facts, facts_of
from handlers._params import check_text, read
from handlers._prompts import source_of
from handlers._region import Pointed, Region, RegionParams, found_in, grown, pointed_at, region_inputs, region_of
from handlers._repaint import FEATHER_PIXELS, check_output, paste, result
from handlers._together import together
from handlers.base import Inputs, Job, Limits, RejectedError, Request, Result, progress_of
from models.base import Canvas, Generator, ImageHWC, Mask, Models, Patch, Role, Stop

ROLES = frozenset({Role.VISUAL, Role.GENERATE})
BATCH_MAX = 4
TIMEOUT_FACTOR = 5.0

CONTEXT = 1.5
"""How much longer than what is replaced the part is that the model sees, so that it knows what to fit in with."""
NOTHING = "nothing was found where you pointed, so nothing was filled"


class FillParams(RegionParams, GenerateParams):
    """The kind's `params`."""

    dilate_kernel_size: Annotated[int, Field(ge=0)] = 50


@dataclass(frozen=True, slots=True)
class Wish:
    """What `parse` makes of a request."""

    params: FillParams
    region: Region
    prompt: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one job."""

    image_hwc: ImageHWC
    region: Pointed
    wish: Wish
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What to paste where, and who found and painted it."""

    mask: Mask
    patches: tuple[Patch, ...]
    seed: int
    facts: Facts
    segmenter: Facts | None


def parse(request: Request, limits: Limits) -> Wish:
    """The row's wish; raises RejectedError."""
    params = read(FillParams, request.params)
    prompt = check_text(request.text_prompt, limits)
    if prompt is None:
        raise RejectedError("prompt_invalid", "Say what to put there: set text_prompt.")
    if params.dilate_kernel_size > limits.dilate_max:
        raise RejectedError("params_invalid", f"dilate_kernel_size may be at most {limits.dilate_max}.")
    check_generating(params, limits)
    return Wish(params, region_of(params, limits), prompt)


def inputs(params: Wish) -> Inputs:
    """The source, and what the masks stand in."""
    return region_inputs(params.region)


def prepare(job: Job, models: Models) -> Prepared:
    """The region in pixels of the image; raises RejectedError for what lies outside it, and for too many words."""
    wish: Wish = job.params
    check_output(job, wish.params)
    check_words(_generator(models), wish.prompt, wish.params.negative_prompt)
    return Prepared(source_of(job).pixels_hwc, pointed_at(wish.region, job, models), wish, seed_of(wish.params, job))


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer | Exception]:
    """Find what is meant and paint it anew, all jobs together."""
    return together(prepared, lambda jobs: _answers(jobs, models, stop), stop)


def finish(job: Job, raw: Answer) -> Result:
    """Paste what was painted, opaque whatever was there, and encode."""
    wish: Wish = job.params
    painting = picture_of(source_of(job))
    patches = [Patch(each.box_xyxy, back(each.pixels_hwc, _size_hw(each.box_xyxy))) for each in raw.patches]
    alpha_hw = None if painting.alpha_hw is None else painting.alpha_hw.copy()
    paste(painting.pixels_hwc, raw.mask, patches, FEATHER_PIXELS, alpha_hw)
    painting = replace(painting, alpha_hw=None if alpha_hw is None or alpha_hw.min() == 255 else alpha_hw)
    extra = {
        "seed": raw.seed,
        "steps": wish.params.steps,
        "guidance_scale": wish.params.guidance_scale,
        "warnings": [] if raw.mask.bits.size else [NOTHING],
    }
    return result(job, painting, wish.params, raw.mask, wish.prompt, raw.facts, raw.segmenter, **extra)


def surroundings(mask: Mask, size_wh: tuple[int, int], side: int) -> tuple[int, int, int, int]:
    """The box that the model sees: a square around the mask, `side` pixels or as many as the mask needs, moved and cut to lie
    inside the image."""
    x0, y0, x1, y1 = mask.box_xyxy
    length = max(side, math.ceil(CONTEXT * max(x1 - x0, y1 - y0)))
    left, right = _span((x0 + x1) / 2, length, size_wh[0])
    top, bottom = _span((y0 + y1) / 2, length, size_wh[1])
    return left, top, right, bottom


def _span(middle: float, length: int, whole: int) -> tuple[int, int]:
    first = min(max(round(middle - length / 2), 0), max(whole - length, 0))
    return first, min(first + length, whole)


def _answers(jobs: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer]:
    generator = _generator(models)
    found = found_in([job.region for job in jobs], models, stop)
    masks = [
        grown(each.mask, job.wish.params.dilate_kernel_size, job.region.size_wh) for job, each in zip(jobs, found, strict=True)
    ]
    boxes = [surroundings(mask, job.region.size_wh, generator.side) for job, mask in zip(jobs, masks, strict=True)]
    canvases = [_canvas(*each, generator.side) for each in zip(jobs, masks, boxes, strict=True) if each[1].bits.size]
    painted = iter(generator.generate(canvases, stop, progress_of(stop)))
    facts = facts_of(generator, False)
    return [
        Answer(mask, (Patch(box, next(painted)),) if mask.bits.size else (), job.seed, facts, each.segmenter)
        for job, mask, box, each in zip(jobs, masks, boxes, found, strict=True)
    ]


def _canvas(job: Prepared, mask: Mask, box_xyxy: tuple[int, int, int, int], side: int) -> Canvas:
    x0, y0, x1, y1 = box_xyxy
    return canvas(job.image_hwc[y0:y1, x0:x1], mask.window_hw(box_xyxy), side, job.wish.prompt, job.wish.params, job.seed)


def _generator(models: Models) -> Generator:
    assert models.generate is not None, "the pool holds this kind's roles"
    return models.generate


def _size_hw(box_xyxy: tuple[int, int, int, int]) -> tuple[int, int]:
    return box_xyxy[3] - box_xyxy[1], box_xyxy[2] - box_xyxy[0]
