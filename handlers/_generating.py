"""What kinds that generate pictures ask alike: words, a seed, how many steps, how closely to follow the words.

Enters: a row's params. Leaves: a `Canvas` of a size that the model can work on, and the way back to the image's own size.
"""

from __future__ import annotations

import hashlib
from typing import Annotated

import cv2
import numpy as np
from pydantic import Field

from handlers._params import Strict
from handlers.base import Job, Limits, RejectedError
from models.base import Canvas, Generator, ImageHWC, MaskHW

MULTIPLE = 8
SEED_MAX = 2**32 - 1


class GenerateParams(Strict):
    """How to generate; a seed makes it repeatable, and is chosen where none is given."""

    seed: Annotated[int, Field(ge=0, le=SEED_MAX)] | None = None
    steps: Annotated[int, Field(ge=1)] = 50
    guidance_scale: Annotated[float, Field(ge=0, le=50)] = 7.5
    negative_prompt: str | None = None


def check_generating(params: GenerateParams, limits: Limits) -> None:
    """Raise RejectedError when more is asked than a task may."""
    if params.steps > limits.steps_max:
        raise RejectedError("params_invalid", f"steps may be at most {limits.steps_max}.")
    if len(params.negative_prompt or "") > limits.text_characters_max:
        raise RejectedError("params_invalid", f"negative_prompt may have at most {limits.text_characters_max} characters.")


def check_words(generator: Generator, *texts: str | None) -> None:
    """Raise RejectedError for a text that the model would cut off."""
    for text in texts:
        if text and (tokens := generator.tokens(text)) > generator.tokens_max:
            raise RejectedError(
                "prompt_invalid", f"The prompt has {tokens} tokens and {generator.tokens_max} are read; use fewer words."
            )


def seed_of(params: GenerateParams, job: Job) -> int:
    """The seed that was asked for, else one of the task's own, so that a second attempt gives the same picture."""
    if params.seed is not None:
        return params.seed
    return int.from_bytes(hashlib.sha256(job.task_id.encode()).digest()[:4], "big")


def canvas(image_hwc: ImageHWC, mask_hw: MaskHW, side_max: int, prompt: str, params: GenerateParams, seed: int) -> Canvas:
    """The picture as the model takes it: its long side `side_max`, both multiples of 8; what is painted anew only in part is."""
    height, width = image_hwc.shape[:2]
    scale = side_max / max(height, width)
    size_wh = _multiple(width * scale), _multiple(height * scale)
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    small_hwc = np.asarray(cv2.resize(image_hwc, size_wh, interpolation=way), dtype=np.uint8)
    share_hw = cv2.resize(mask_hw.astype(np.float32), size_wh, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)
    return Canvas(small_hwc, share_hw > 0, prompt, params.negative_prompt or "", seed, params.steps, params.guidance_scale)


def back(painted_hwc: ImageHWC, size_hw: tuple[int, int]) -> ImageHWC:
    """What was painted, at the size of the part of the image that it is for."""
    if painted_hwc.shape[:2] == size_hw:
        return painted_hwc
    smaller = painted_hwc.shape[0] > size_hw[0]
    way = cv2.INTER_AREA if smaller else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(painted_hwc, size_hw[::-1], interpolation=way), dtype=np.uint8)


def _multiple(length: float) -> int:
    return max(round(length / MULTIPLE), 1) * MULTIPLE
