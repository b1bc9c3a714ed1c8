"""The image in another format, and smaller if wished.

Asks for `format` (left out: its own, where that can be written, else PNG), `quality` and `max_side`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from handlers._images_out import FILES, FormatName, Output, Picture, check_side, picture_of, result
from handlers._params import read
from handlers._prompts import source_of
from handlers._together import together
from handlers.base import Inputs, Job, Limits, RejectedError, Request, Result, SourceImage
from models.base import Models, Role, Stop

ROLES: frozenset[Role] = frozenset()
BATCH_MAX = 1
TIMEOUT_FACTOR = 1.0


class ConvertParams(Output):
    """The kind's `params`."""

    max_side: Annotated[int, Field(ge=1)] | None = None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one job."""

    image: SourceImage
    size_wh: tuple[int, int]


def parse(request: Request, limits: Limits) -> ConvertParams:
    """The row's wish; raises RejectedError."""
    params = read(ConvertParams, request.params)
    if (params.max_side or 0) > limits.side_max:
        raise RejectedError("params_invalid", f"max_side may be at most {limits.side_max}.")
    return params


def inputs(params: ConvertParams) -> Inputs:
    """The source only."""
    return Inputs()


def prepare(job: Job, models: Models) -> Prepared:
    """The image and the size it shall have; raises RejectedError when the format cannot hold it."""
    image, params = source_of(job), job.params
    size_wh = _shrunk(image.size_wh, params.max_side)
    check_side(_format(params, image), size_wh)
    return Prepared(image, size_wh)


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Picture | Exception]:
    """Resize."""
    return together(prepared, lambda jobs: [_picture(job) for job in jobs], stop)


def finish(job: Job, raw: Picture) -> Result:
    """Encode."""
    return result(job, raw, _format(job.params, source_of(job)), job.params, model_id="convert_image")


def _format(params: ConvertParams, image: SourceImage) -> FormatName:
    own: FormatName = image.format if image.format in FILES else "PNG"  # type: ignore[assignment]
    return params.format or own


def _shrunk(size_wh: tuple[int, int], side_max: int | None) -> tuple[int, int]:
    """The size with the longer side at most `side_max`; never more than it was."""
    width, height = size_wh
    scale = min((side_max or max(size_wh)) / max(size_wh), 1.0)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _picture(job: Prepared) -> Picture:
    """Colours lie on white while they are averaged, so that transparent pixels lend theirs to none."""
    image = job.image
    if job.size_wh != image.size_wh:
        alpha_hw = None if image.alpha_hw is None else _resized(image.alpha_hw, job.size_wh)
        image = replace(image, pixels_hwc=_resized(image.pixels_hwc, job.size_wh), alpha_hw=alpha_hw)
    return picture_of(image)


def _resized(levels: npt.NDArray[np.uint8], size_wh: tuple[int, int]) -> npt.NDArray[np.uint8]:
    return np.asarray(cv2.resize(levels, size_wh, interpolation=cv2.INTER_AREA), dtype=np.uint8)
