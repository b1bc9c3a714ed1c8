"""What a row points at to the prompts a model takes, checked against the image.

Enters: `ObjectPrompt`s and a `Job`. Leaves: `Prompt` values that lie inside the image, or RejectedError("prompt_invalid", …).
"""

from __future__ import annotations

from collections.abc import Sequence

from handlers._masks_in import mask_from
from handlers._params import Box, ObjectPrompt, Point
from handlers.base import Job, RejectedError, SourceImage
from models.base import Embedder, Mask, Models, Prompt, View


def source_of(job: Job) -> SourceImage:
    """The job's image; raises RejectedError where the row named none."""
    if job.image is None:
        raise RejectedError("image_missing", "This kind needs an image; set source_image_url.")
    return job.image


def view_of(job: Job, models: Models, embedder: Embedder) -> View:
    """The job's image as that model wants it; raises RejectedError where the row named none."""
    image = source_of(job)
    return models.embeddings.view(embedder, image.content_hash, image.pixels_hwc)


def prompts_of(objects: Sequence[ObjectPrompt], job: Job) -> list[Prompt]:
    """One prompt per object, in order; raises RejectedError when one does not fit the image."""
    size_wh = source_of(job).size_wh
    return [_prompt(wanted, job, size_wh) for wanted in objects]


def _prompt(wanted: ObjectPrompt, job: Job, size_wh: tuple[int, int]) -> Prompt:
    points = wanted.all_points()
    return Prompt(
        points_xy=tuple(inside(point, size_wh) for point in points),
        labels=tuple(point.label for point in points),
        box_xyxy=None if wanted.box is None else clipped(wanted.box, size_wh),
        mask=None if wanted.mask is None else _mask(wanted, job, size_wh),
    )


def inside(point: Point, size_wh: tuple[int, int]) -> tuple[float, float]:
    """The point; raises RejectedError when it lies outside the image."""
    if 0 <= point.x < size_wh[0] and 0 <= point.y < size_wh[1]:
        return point.x, point.y
    raise RejectedError(
        "prompt_invalid",
        f"The point ({point.x:g}, {point.y:g}) lies outside the image, which has {size_wh[0]} x {size_wh[1]} pixels.",
    )


def clipped(box_xyxy: Box, size_wh: tuple[int, int]) -> Box:
    """The part of a box inside the image; raises RejectedError when there is none, or the box is empty or inverted."""
    x0, y0, x1, y1 = box_xyxy
    shown = f"The box [{x0:g}, {y0:g}, {x1:g}, {y1:g}]"
    if x1 <= x0 or y1 <= y0:
        raise RejectedError("prompt_invalid", f"{shown} is empty; a box is [x0, y0, x1, y1] with x0 < x1 and y0 < y1.")
    width, height = size_wh
    if x1 <= 0 or y1 <= 0 or x0 >= width or y0 >= height:
        raise RejectedError("prompt_invalid", f"{shown} lies outside the image, which has {width} x {height} pixels.")
    return max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))


def _mask(wanted: ObjectPrompt, job: Job, size_wh: tuple[int, int]) -> Mask:
    assert wanted.mask is not None
    mask = mask_from(wanted.mask, job, size_wh)
    if not mask.bits.size:
        raise RejectedError("prompt_invalid", "The mask that is meant as a prompt is empty.")
    return mask
