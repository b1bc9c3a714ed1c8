"""What clients of sessions send, validated, and what they get: shapes of JSON, without HTTP.

Enters: JSON values and masks. Leaves: prompts in pixels of the image, or one sentence; replies as JSON values. Pure.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Field

from daemon.session_masks import SizeWH, drawn, reference_of, referred
from handlers._coco import polygons
from handlers._params import AnyPoint, Box, Rle, Strict, read
from handlers._png import mask_png
from handlers._prompts import clipped, inside
from handlers._rle import segmentation
from handlers.base import Limits, RejectedError
from models.base import Mask, Prompt

DRAWN = (255, 255, 255)


class MaskGiven(Strict):
    """A mask that did not come from here."""

    rle: Rle


class PredictBody(Strict):
    """POST /session/{id}/predict. `mask` is the mask_ref of an earlier answer, or run lengths."""

    points: Annotated[list[AnyPoint], Field(fail_fast=True)] = Field(default_factory=list)
    box: Box | None = None
    mask: str | MaskGiven | None = None
    multimask: bool | None = None
    format: Literal["rle", "png", "polygon"] = "rle"
    supersede: Annotated[str, Field(max_length=100)] | None = None


class ImageBody(Strict):
    """POST /session for an image that is stored already."""

    project_id: UUID
    image_url: Annotated[str, Field(min_length=1, max_length=2048)]


def prompt_body(values: Mapping[str, Any], limits: Limits) -> PredictBody:
    """A click as it was sent; raises RejectedError."""
    body = read(PredictBody, values)
    if len(body.points) > limits.points_max:
        raise RejectedError("params_invalid", f"There are {len(body.points)} points; at most {limits.points_max} are allowed.")
    if body.box is None and body.mask is None and not any(point.label == 1 for point in body.points):
        raise RejectedError("prompt_invalid", "Point at something: give at least one foreground point, a box or a mask.")
    return body


def prompt_of(body: PredictBody, size_wh: SizeWH) -> Prompt:
    """The prompt, which lies inside the image; raises RejectedError. A mask is work for a thread."""
    mask: Mask | None = None
    if isinstance(body.mask, str):
        mask = referred(body.mask, size_wh)
    elif body.mask is not None:
        mask = drawn(body.mask.rle.model_dump(), size_wh)
    return Prompt(
        points_xy=tuple(inside(point, size_wh) for point in body.points),
        labels=tuple(point.label for point in body.points),
        box_xyxy=None if body.box is None else clipped(body.box, size_wh),
        mask=mask,
    )


def answers(masks: Sequence[Mask], size_wh: SizeWH, form: str) -> list[dict[str, Any]]:
    """Masks as they are sent, best first, those that are empty left out."""
    return [
        {
            "score": round(mask.score, 4),
            "box": list(mask.box_xyxy),
            "area": mask.area,
            "mask_ref": reference_of(mask, size_wh),
            **_shape(mask, size_wh, form),
        }
        for mask in masks
        if mask.bits.size
    ]


def _shape(mask: Mask, size_wh: SizeWH, form: str) -> dict[str, Any]:
    if form == "png":
        return {"png": base64.b64encode(mask_png([mask], [DRAWN], size_wh)).decode()}
    if form == "polygon":
        return {"polygons": polygons(mask)}
    return {"rle": segmentation(mask, size_wh)}
