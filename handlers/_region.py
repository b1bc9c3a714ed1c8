"""What of an image is meant: points, boxes and objects for the host's visual segmenter, and masks that are there already.

Enters: a row's `params`. Leaves: one mask per job, the union of all that it names, grown where that is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import cv2
import numpy as np
from pydantic import Field

from handlers._edges import combined, edges_of_mask, filled
from handlers._images_out import Output
from handlers._instances import Facts, facts_of
from handlers._masks_in import inputs_of, mask_from
from handlers._params import MaskSource, ObjectPrompt, VisualPrompts, check_mask_images, check_objects
from handlers._prompts import prompts_of, source_of, view_of
from handlers.base import BlobRef, Inputs, Job, Limits, RejectedError
from models.base import Later, Mask, Models, Prompt, Stop, View, VisualQuestion, pack


class RegionParams(VisualPrompts, Output):
    """Points, boxes or objects, and masks; and the file that is wanted."""

    masks: Annotated[list[MaskSource], Field(fail_fast=True)] | None = None


@dataclass(frozen=True, slots=True)
class Region:
    """What `region_of` makes of the params."""

    objects: tuple[ObjectPrompt, ...]
    masks: tuple[MaskSource, ...]


@dataclass(frozen=True, slots=True)
class Pointed:
    """A region of one job, checked against its image; `view` is None where no segmenter is needed."""

    size_wh: tuple[int, int]
    view: View | None
    prompts: tuple[Prompt, ...]
    masks: tuple[Mask, ...]


@dataclass(frozen=True, slots=True)
class Found:
    """The mask of a region, and which segmenter found it, if one was asked."""

    mask: Mask
    segmenter: Facts | None


def region_of(params: RegionParams, limits: Limits) -> Region:
    """What a row points at; raises RejectedError."""
    masks = params.masks or []
    pointed = bool(params.objects) or bool(params.boxes) or bool(params.all_points())
    if not pointed and not masks:
        raise RejectedError("prompt_invalid", "Point at something: give points, boxes, objects or masks.")
    objects = params.all_objects() if pointed else []
    check_objects(objects, limits)
    if len(masks) > limits.masks_max:
        raise RejectedError("params_invalid", f"There are {len(masks)} masks; at most {limits.masks_max} are allowed.")
    region = Region(tuple(objects), tuple(masks))
    check_mask_images(_sources(region), limits)
    return region


def region_inputs(region: Region, blobs: tuple[BlobRef, ...] = ()) -> Inputs:
    """The source, what the masks stand in, and `blobs` besides."""
    return inputs_of(_sources(region), blobs)


def pointed_at(region: Region, job: Job, models: Models) -> Pointed:
    """The region in pixels of the job's image; raises RejectedError when something of it does not fit."""
    size_wh = source_of(job).size_wh
    view = None
    if region.objects:
        assert models.visual is not None, "the pool holds this kind's roles"
        view = view_of(job, models, models.visual)
    masks = tuple(mask_from(source, job, size_wh) for source in region.masks)
    return Pointed(size_wh, view, tuple(prompts_of(region.objects, job)), masks)


def found_in(regions: Sequence[Pointed], models: Models, stop: Stop) -> list[Found]:
    """The mask of each region; all prompts of all jobs are answered together."""
    asked = [region for region in regions if region.view is not None]
    answers: dict[int, tuple[list[Later], Facts]] = {}
    if asked:
        assert models.visual is not None, "the pool holds this kind's roles"
        embedded = models.embeddings.get(models.visual, [region.view for region in asked if region.view is not None])
        questions = [
            VisualQuestion(embedding, prompt)
            for region, (embedding, _) in zip(asked, embedded, strict=True)
            for prompt in region.prompts
        ]
        found = iter(models.visual.segment(questions, stop))
        for region, (_, cached) in zip(asked, embedded, strict=True):
            answers[id(region)] = [next(found) for _ in region.prompts], facts_of(models.visual, cached)
    return [_found(region, *answers.get(id(region), ([], None))) for region in regions]


def grown(mask: Mask, kernel_side: int, size_wh: tuple[int, int]) -> Mask:
    """The mask dilated by a square of `kernel_side` pixels, as cv2.dilate does, in its own box and around it only."""
    if kernel_side <= 1 or not mask.bits.size:
        return mask
    x0, y0, x1, y1 = mask.box_xyxy
    left, top = max(x0 - kernel_side, 0), max(y0 - kernel_side, 0)
    right, bottom = min(x1 + kernel_side, size_wh[0]), min(y1 + kernel_side, size_wh[1])
    window_hw = mask.window_hw((left, top, right, bottom)).view(np.uint8)
    wider_hw = cv2.dilate(window_hw, np.ones((kernel_side, kernel_side), dtype=np.uint8))
    return pack(np.asarray(wider_hw, dtype=np.uint8), (left, top))


def _sources(region: Region) -> list[MaskSource]:
    """All masks that a region names, those inside objects first."""
    return [*(wanted.mask for wanted in region.objects if wanted.mask is not None), *region.masks]


def _found(region: Pointed, laters: Sequence[Later], segmenter: Facts | None) -> Found:
    best = [masks[0] for masks in (later() for later in laters) if masks]
    masks = [mask for mask in (*best, *region.masks) if mask.bits.size]
    if len(masks) == 1:
        return Found(masks[0], segmenter)
    edges = combined("union", (edges_of_mask(mask, region.size_wh) for mask in masks))
    return Found(filled(edges, region.size_wh), segmenter)
