"""The image without what is pointed at: what might be behind it is painted over it.

Asks for points, boxes, objects or masks; `dilate_kernel_size` grows what is removed, so that its shadow's rim goes too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from handlers._images_out import picture_of
from handlers._instances import Facts, facts_of
from handlers._params import check_text, read
from handlers._prompts import source_of
from handlers._region import Pointed, Region, RegionParams, found_in, grown, pointed_at, region_inputs, region_of
from handlers._repaint import FEATHER_PIXELS, check_output, paste, result
from handlers._together import together
from handlers.base import Inputs, Job, Limits, RejectedError, Request, Result
from models.base import Hole, ImageHWC, Mask, Models, Patch, Role, Stop

ROLES = frozenset({Role.VISUAL, Role.INPAINT})
BATCH_MAX = 4
TIMEOUT_FACTOR = 2.0

UNNAMED = "removed"
NOTHING = "nothing was found where you pointed, so nothing was removed"
TRANSPARENT = "some of what was removed is transparent, and stays so"


class RemoveParams(RegionParams):
    """The kind's `params`."""

    dilate_kernel_size: Annotated[int, Field(ge=0)] = 15


@dataclass(frozen=True, slots=True)
class Wish:
    """What `parse` makes of a request."""

    params: RemoveParams
    region: Region
    label: str


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one job."""

    image_hwc: ImageHWC
    region: Pointed
    kernel_side: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What to paste where, and who found and painted it."""

    mask: Mask
    patches: tuple[Patch, ...]
    facts: Facts
    segmenter: Facts | None


def parse(request: Request, limits: Limits) -> Wish:
    """The row's wish; raises RejectedError."""
    params = read(RemoveParams, request.params)
    if params.dilate_kernel_size > limits.dilate_max:
        raise RejectedError("params_invalid", f"dilate_kernel_size may be at most {limits.dilate_max}.")
    return Wish(params, region_of(params, limits), check_text(request.text_prompt, limits) or UNNAMED)


def inputs(params: Wish) -> Inputs:
    """The source, and what the masks stand in."""
    return region_inputs(params.region)


def prepare(job: Job, models: Models) -> Prepared:
    """The region in pixels of the image; raises RejectedError when something of it lies outside."""
    wish: Wish = job.params
    check_output(job, wish.params)
    return Prepared(source_of(job).pixels_hwc, pointed_at(wish.region, job, models), wish.params.dilate_kernel_size)


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer | Exception]:
    """Find what is meant and paint over it, all jobs together."""
    return together(prepared, lambda jobs: _answers(jobs, models, stop), stop)


def finish(job: Job, raw: Answer) -> Result:
    """Paste what was painted, and encode."""
    wish: Wish = job.params
    painting = picture_of(source_of(job))
    paste(painting.pixels_hwc, raw.mask, raw.patches, min(FEATHER_PIXELS, wish.params.dilate_kernel_size // 4))
    warnings = [] if raw.mask.bits.size else [NOTHING]
    x0, y0, x1, y1 = raw.mask.box_xyxy
    if painting.alpha_hw is not None and ((painting.alpha_hw[y0:y1, x0:x1] < 255) & raw.mask.crop_hw()).any():
        warnings.append(TRANSPARENT)
    return result(job, painting, wish.params, raw.mask, wish.label, raw.facts, raw.segmenter, warnings=warnings)


def _answers(jobs: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer]:
    painter = models.inpaint
    assert painter is not None, "the pool holds this kind's roles"
    found = found_in([job.region for job in jobs], models, stop)
    masks = [grown(each.mask, job.kernel_side, job.region.size_wh) for job, each in zip(jobs, found, strict=True)]
    holes = [Hole(job.image_hwc, mask) for job, mask in zip(jobs, masks, strict=True) if mask.bits.size]
    patches = iter(painter.inpaint(holes, stop))
    facts = facts_of(painter, False)
    return [
        Answer(mask, tuple(next(patches)) if mask.bits.size else (), facts, each.segmenter)
        for mask, each in zip(masks, found, strict=True)
    ]
