"""Colours on masks: the image with each layer painted in its mask, the first one first.

Asks for `layers: [{mask, color, opacity}]`, `format` and `quality`. Transparency and colour profile stay as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np
from pydantic import Field

from handlers._colours import RGB, Colour, hex_of
from handlers._images_out import Output, Picture, check_side, picture_of, result
from handlers._masks_in import inputs_of, mask_from
from handlers._params import MaskSource, Share, Strict, check_mask_images, read
from handlers._prompts import source_of
from handlers._together import together
from handlers.base import Inputs, Job, Limits, RejectedError, Request, Result
from models.base import ImageHWC, Mask, Models, Role, Stop

ROLES: frozenset[Role] = frozenset()
BATCH_MAX = 1
TIMEOUT_FACTOR = 1.0


class Layer(Strict):
    """One mask and how it is painted; several masks of a task are painted as one."""

    mask: MaskSource
    color: Colour = (255, 0, 0)
    opacity: Share = 0.7


class PaintParams(Output):
    """The kind's `params`."""

    layers: Annotated[list[Layer], Field(min_length=1, fail_fast=True)]


@dataclass(frozen=True, slots=True)
class Painted:
    """The picture, and per layer what was painted: (box_xyxy, area)."""

    picture: Picture
    extents: tuple[tuple[tuple[int, int, int, int], int], ...]


def parse(request: Request, limits: Limits) -> PaintParams:
    """The row's wish; raises RejectedError."""
    params = read(PaintParams, request.params)
    if len(params.layers) > limits.masks_max:
        raise RejectedError("params_invalid", f"There are {len(params.layers)} layers; at most {limits.masks_max} are allowed.")
    check_mask_images((layer.mask for layer in params.layers), limits)
    return params


def inputs(params: PaintParams) -> Inputs:
    """The source, and where the masks come from."""
    return inputs_of(layer.mask for layer in params.layers)


def prepare(job: Job, models: Models) -> Job:
    """The job as it is: its masks are read one after the other when they are painted, since all at once may be large."""
    check_side(_format(job), source_of(job).size_wh)
    return job


def run(prepared: Sequence[Job], models: Models, stop: Stop) -> list[Painted | Exception]:
    """Paint; a mask that is missing or does not fit is answered with RejectedError."""
    return together(prepared, lambda jobs: [_painted(job, stop) for job in jobs], stop)


def finish(job: Job, raw: Painted) -> Result:
    """Encode, and list the layers."""
    layers = job.params.layers
    labels = [_label(index, layer, *extent) for index, (layer, extent) in enumerate(zip(layers, raw.extents, strict=True))]
    empty = [f"layer {label['id']} painted nothing: its mask is empty" for label in labels if not label["area"]]
    return result(job, raw.picture, _format(job), job.params, labels, model_id="paint_masks", count=len(labels), warnings=empty)


def paint(canvas_hwc: ImageHWC, mask: Mask, colour: RGB, opacity: float) -> None:
    """Blend a colour into the pixels of a mask, in place and in its box only, rounded to the nearest level.

    A channel's new level depends on its old one alone, so a table of 256 levels does it.
    """
    if not mask.bits.size:
        return
    x0, y0, x1, y1 = mask.box_xyxy
    levels = np.arange(256)[:, None] * (1 - opacity) + np.array(colour) * opacity
    crop_hwc = canvas_hwc[y0:y1, x0:x1]
    blended_hwc = cv2.LUT(crop_hwc, np.rint(levels).astype(np.uint8).reshape(1, 256, 3))
    cv2.copyTo(blended_hwc, mask.crop_hw().view(np.uint8), crop_hwc)


def _painted(job: Job, stop: Stop) -> Painted:
    source, extents = source_of(job), []
    picture = picture_of(source)
    for layer in job.params.layers:
        stop()
        mask = mask_from(layer.mask, job, source.size_wh)
        paint(picture.pixels_hwc, mask, layer.color, layer.opacity)
        extents.append((mask.box_xyxy, mask.area))
    return Painted(picture, tuple(extents))


def _format(job: Job) -> Any:
    return job.params.format or "PNG"


def _label(index: int, layer: Layer, box_xyxy: tuple[int, int, int, int], area: int) -> dict[str, Any]:
    return {"id": index + 1, "color": hex_of(layer.color), "opacity": layer.opacity, "area": area, "box": list(box_xyxy)}
