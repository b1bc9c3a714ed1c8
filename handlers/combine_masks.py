"""Several masks to one: their union, what all have in common, the first without the others, or what an odd number covers.

Asks for `masks: [mask reference, …]` and `op`. A reference to a task means all its masks, in order; one that found nothing
counts as an empty mask. The masks themselves say how large their image is, the source image only where they do not, or not
all the same. A text_prompt names the result.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

from pydantic import Field

from handlers._edges import Edges, Operation, combined, filled
from handlers._instances import Facts, Instance, result
from handlers._masks_in import edges_of, image_size_of, inputs_of
from handlers._params import MaskSource, Strict, check_mask_images, check_text, read
from handlers._together import together
from handlers.base import Inputs, Job, Limits, RejectedError, Request, Result
from models.base import Mask, Models, Role, Stop

ROLES: frozenset[Role] = frozenset()
BATCH_MAX = 1
TIMEOUT_FACTOR = 1.0

UNNAMED = "mask"
FACTS = Facts("maskd", "combine_masks", "cpu", False)


class CombineParams(Strict):
    """The kind's `params`."""

    masks: Annotated[list[MaskSource], Field(min_length=1, fail_fast=True)]
    op: Operation = "union"


@dataclass(frozen=True, slots=True)
class Wish:
    """What `parse` makes of a request."""

    masks: tuple[MaskSource, ...]
    operation: Operation
    label: str
    has_source: bool


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one job. Masks are read when they are combined, since all at once may be large."""

    job: Job
    size_wh: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Answer:
    """The one mask, and the size of its image."""

    mask: Mask
    size_wh: tuple[int, int]


def parse(request: Request, limits: Limits) -> Wish:
    """The row's wish; raises RejectedError."""
    params = read(CombineParams, request.params)
    if len(params.masks) > limits.masks_max:
        raise RejectedError("params_invalid", f"There are {len(params.masks)} masks; at most {limits.masks_max} are allowed.")
    check_mask_images(params.masks, limits)
    _check_sizes(params.masks, limits)
    label = check_text(request.text_prompt, limits) or UNNAMED
    return Wish(tuple(params.masks), params.op, label, bool(request.source_image_url))


def inputs(params: Wish) -> Inputs:
    """Where the masks come from, and the source where the row names one."""
    return replace(inputs_of(params.masks), source=params.has_source)


def prepare(job: Job, models: Models) -> Prepared:
    """The size of the image that all masks must fit; raises RejectedError where nothing says it.

    The source image may be of another size than all masks: a task after another takes what that one made as its image.
    """
    wish: Wish = job.params
    sizes = [size for size in (image_size_of(source, job) for source in wish.masks) if size]
    own = [] if job.image is None else [job.image.size_wh]
    said = sizes[:1] if len(set(sizes)) == 1 else own + sizes
    if not said:
        raise RejectedError("image_missing", "Polygons alone do not say how large their image is; set source_image_url.")
    return Prepared(job, said[0])


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer | Exception]:
    """Combine; a mask that is missing or does not fit is answered with RejectedError."""
    return together(prepared, lambda jobs: [_answer(job, stop) for job in jobs], stop)


def finish(job: Job, raw: Answer) -> Result:
    """Draw the mask, if anything is left of it."""
    wish: Wish = job.params
    instances = [Instance(raw.mask, wish.label)] if raw.mask.bits.size else []
    return result(job, instances, raw.size_wh, FACTS, op=wish.operation)


def _check_sizes(masks: Sequence[MaskSource], limits: Limits) -> None:
    """Run lengths may name an image of any size, which nobody has decoded within limits."""
    for rle in (source.rle for source in masks if source.rle is not None):
        height, width = rle.size
        if width * height > limits.pixels_max:
            raise RejectedError(
                "image_too_large",
                f"The rle is of an image of {width} x {height} pixels; at most {limits.pixels_max:,} are accepted.",
            )


def _answer(prepared: Prepared, stop: Stop) -> Answer:
    wish: Wish = prepared.job.params
    return Answer(filled(combined(wish.operation, _all_edges(prepared, stop)), prepared.size_wh), prepared.size_wh)


def _all_edges(prepared: Prepared, stop: Stop) -> Iterator[Edges]:
    for source in prepared.job.params.masks:
        for edges in edges_of(source, prepared.job, prepared.size_wh):
            stop()
            yield edges
