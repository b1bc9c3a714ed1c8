"""What is pointed at stays, all around it becomes new: what the prompt says, a colour, the same but blurred, or another image.

Asks for points, boxes, objects or masks of what stays, and for one of text_prompt, `color`, `blur` and `background_image_url`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import cv2
import numpy as np
import numpy.typing as npt
from pydantic import Field

from handlers._colours import RGB, Colour
from handlers._generating import GenerateParams, back, canvas, check_generating, check_words, seed_of
from handlers._images_out import Picture as Painting
from handlers._instances import Facts, facts_of
from handlers._params import check_text, read
from handlers._prompts import source_of
from handlers._region import Pointed, Region, RegionParams, found_in, pointed_at, region_inputs, region_of
from handlers._repaint import blend, check_output, result, rising, strips
from handlers._together import together
from handlers.base import (
    BlobRef,
    Inputs,
    Job,
    Limits,
    RejectedError,
    Request,
    Result,
    SourceImage,
    UnservedError,
    progress_of,
)
from models.base import Generator, ImageHWC, Mask, Models, Role, Stop

ROLES = frozenset({Role.VISUAL})
MAY_USE = frozenset({Role.GENERATE})
"""Where there is a prompt; a host without a generator gives such rows back."""
BATCH_MAX = 2
TIMEOUT_FACTOR = 5.0

SIDE_MAX = 1024
"""Of a generated background, which is enlarged behind the object; more takes models minutes and gives repetitions."""
FEATHER_PIXELS = 2
SIGMA_MAX = 4.0
"""Of a blur at full size, in pixels; above it a smaller image is blurred and enlarged."""
SHARE_MIN = 1e-3
"""How much of what is around a pixel has to lie behind what stays, so that a colour can be told from it."""
BACKGROUND = "background"
FACTS = Facts("maskd", "replace_background", "cpu", False)
KEPT = "kept"
NOTHING = "nothing was found where you pointed, so the whole image was replaced"


class ReplaceParams(RegionParams, GenerateParams):
    """The kind's `params`."""

    color: Colour | None = None
    blur: Annotated[float, Field(gt=0)] | None = None
    background_image_url: Annotated[str, Field(min_length=1, max_length=2048)] | None = None


@dataclass(frozen=True, slots=True)
class Wish:
    """What `parse` makes of a request."""

    params: ReplaceParams
    region: Region
    prompt: str | None


@dataclass(frozen=True, slots=True)
class Prepared:
    """What `run` needs of one job."""

    job: Job
    region: Pointed
    seed: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What stays, what was generated, if anything was, and by whom."""

    kept: Mask
    background_hwc: ImageHWC | None
    seed: int | None
    facts: Facts
    segmenter: Facts | None


def parse(request: Request, limits: Limits) -> Wish:
    """The row's wish; raises RejectedError."""
    params = read(ReplaceParams, request.params)
    prompt = check_text(request.text_prompt, limits)
    given = [value for value in (prompt, params.color, params.blur, params.background_image_url) if value is not None]
    if len(given) != 1:
        raise RejectedError(
            "prompt_invalid" if not given else "params_invalid",
            "A new background is exactly one of text_prompt, color, blur and background_image_url.",
        )
    if (params.blur or 0) > limits.blur_max:
        raise RejectedError("params_invalid", f"blur may be at most {limits.blur_max}.")
    check_generating(params, limits)
    return Wish(params, region_of(params, limits), prompt)


def inputs(params: Wish) -> Inputs:
    """The source, what the masks stand in, and the background where it is an image."""
    url = params.params.background_image_url
    return region_inputs(params.region, () if url is None else (BlobRef(BACKGROUND, url),))


def prepare(job: Job, models: Models) -> Prepared:
    """The region in pixels of the image; raises RejectedError for what lies outside it, and for too many words."""
    wish: Wish = job.params
    check_output(job, wish.params)
    if wish.prompt is not None:
        if models.generate is None:
            raise UnservedError("No worker here can paint what a prompt says; use color, blur or background_image_url.")
        check_words(models.generate, wish.prompt, wish.params.negative_prompt)
    return Prepared(job, pointed_at(wish.region, job, models), seed_of(wish.params, job))


def run(prepared: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer | Exception]:
    """Find what stays, and generate where that is asked for, all jobs together."""
    return together(prepared, lambda jobs: _answers(jobs, models, stop), stop)


def finish(job: Job, raw: Answer) -> Result:
    """Lay what stays on its new background, and encode."""
    wish: Wish = job.params
    source = source_of(job)
    background_hwc = _background(job, raw)
    lay(source, raw.kept, background_hwc)
    painting = Painting(background_hwc, None, source.icc_profile)
    extra: dict[str, Any] = {"warnings": [] if raw.kept.bits.size else [NOTHING]}
    if raw.seed is not None:
        extra |= {"seed": raw.seed, "steps": wish.params.steps, "guidance_scale": wish.params.guidance_scale}
    return result(job, painting, wish.params, raw.kept, KEPT, raw.facts, raw.segmenter, **extra)


def lay(source: SourceImage, kept: Mask, background_hwc: ImageHWC) -> None:
    """Put what stays on the background, in place: exactly as it was inside the mask, fading out over a few pixels around it.
    Through what is transparent the background is seen."""
    width, height = source.size_wh
    x0, y0, x1, y1 = kept.box_xyxy
    reach = FEATHER_PIXELS + 1
    left, right = max(x0 - reach, 0), min(x1 + reach, width)
    first, end = (max(y0 - reach, 0), min(y1 + reach, height)) if kept.bits.size else (0, 0)
    for top, bottom in strips(right - left, first, end):
        above, below = max(top - reach, first), min(bottom + reach, end)
        outside_hw = np.logical_not(kept.window_hw((left, above, right, below))).view(np.uint8)
        depth_hw = cv2.distanceTransform(outside_hw, cv2.DIST_L2, 3)[top - above : bottom - above]
        new_hwc = background_hwc[top:bottom, left:right]
        blend(_seen_on(new_hwc, source, (left, top, right, bottom)), new_hwc, rising(depth_hw, reach), new_hwc)


def _seen_on(background_hwc: ImageHWC, source: SourceImage, box_xyxy: tuple[int, int, int, int]) -> ImageHWC:
    """A box of the source on another ground than the white that it lies on."""
    x0, y0, x1, y1 = box_xyxy
    crop_hwc = source.pixels_hwc[y0:y1, x0:x1]
    if source.alpha_hw is None:
        return crop_hwc
    through = 255 - source.alpha_hw[y0:y1, x0:x1, None].astype(np.int32)
    darker = ((255 - background_hwc.astype(np.int32)) * through + 127) // 255
    return np.maximum(crop_hwc - darker, 0).astype(np.uint8)


def blurred(image_hwc: ImageHWC, kept: Mask, sigma: float) -> ImageHWC:
    """The image behind what stays, blurred (Gaussian, `sigma` pixels); what stays lends it no colour, so that it has no halo."""
    height, width = image_hwc.shape[:2]
    scale = 1.0 if sigma <= SIGMA_MAX else min(0.5, SIGMA_MAX / sigma)  # what is blurred needs no fine pixels
    size_wh = max(round(width * scale), 1), max(round(height * scale), 1)
    behind_hw = kept.window_hw((0, 0, width, height)).view(np.uint8)
    np.subtract(1, behind_hw, out=behind_hw)
    behind_hw *= 255
    weights_hw, small_hwc = _shrunk(behind_hw, size_wh), _shrunk(image_hwc, size_wh)
    del behind_hw
    soft_hwc = np.empty_like(small_hwc)
    margin = math.ceil(4 * sigma * scale) + 1
    for top, bottom in strips(size_wh[0], 0, size_wh[1]):
        above, below = max(top - margin, 0), min(bottom + margin, size_wh[1])
        strip_hwc = _soft(small_hwc[above:below], weights_hw[above:below], sigma * scale)
        soft_hwc[top:bottom] = strip_hwc[top - above : bottom - above]
    if size_wh == (width, height):
        return soft_hwc
    return np.asarray(cv2.resize(soft_hwc, (width, height), interpolation=cv2.INTER_LINEAR), dtype=np.uint8)


def _shrunk(levels: npt.NDArray[np.uint8], size_wh: tuple[int, int]) -> npt.NDArray[np.uint8]:
    if size_wh == (levels.shape[1], levels.shape[0]):
        return levels
    return np.asarray(cv2.resize(levels, size_wh, interpolation=cv2.INTER_AREA), dtype=np.uint8)


def _soft(image_hwc: ImageHWC, weights_hw: npt.NDArray[np.uint8], sigma: float) -> ImageHWC:
    """The weighted mean around each pixel; the plain one where nothing near has any weight."""
    levels_hwc = image_hwc.astype(np.float32)
    shares_hw: npt.NDArray[Any] = weights_hw.astype(np.float32) / 255
    sums_hwc: npt.NDArray[Any] = cv2.GaussianBlur(levels_hwc * shares_hw[:, :, None], (0, 0), sigma)
    shares_hw = cv2.GaussianBlur(shares_hw, (0, 0), sigma)
    known_hw = shares_hw > SHARE_MIN
    sums_hwc /= np.maximum(shares_hw, SHARE_MIN)[:, :, None]
    if not known_hw.all():
        np.copyto(sums_hwc, cv2.GaussianBlur(levels_hwc, (0, 0), sigma), where=~known_hw[:, :, None])
    soft_hwc: ImageHWC = np.minimum(np.rint(sums_hwc, out=sums_hwc), 255).astype(np.uint8)
    return soft_hwc


def covering(image_hwc: ImageHWC, size_wh: tuple[int, int]) -> ImageHWC:
    """The middle of another image, scaled so that it covers a picture of that size."""
    height, width = image_hwc.shape[:2]
    scale = max(size_wh[0] / width, size_wh[1] / height)
    crop_w, crop_h = (min(max(round(a / scale), 1), b) for a, b in ((size_wh[0], width), (size_wh[1], height)))
    left, top = (width - crop_w) // 2, (height - crop_h) // 2
    crop_hwc = image_hwc[top : top + crop_h, left : left + crop_w]
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(crop_hwc, size_wh, interpolation=way), dtype=np.uint8)


def _background(job: Job, raw: Answer) -> ImageHWC:
    """The new background at full size, to be painted on."""
    params: ReplaceParams = job.params.params
    source = source_of(job)
    if raw.background_hwc is not None:
        painted_hwc = back(raw.background_hwc, source.pixels_hwc.shape[:2])
        return painted_hwc.copy() if painted_hwc is raw.background_hwc else painted_hwc
    if params.color is not None:
        return _plain(params.color, source.pixels_hwc)
    if params.blur is not None:
        return blurred(source.pixels_hwc, raw.kept, params.blur)
    return covering(job.images[BACKGROUND].pixels_hwc, source.size_wh)


def _plain(colour: RGB, like_hwc: ImageHWC) -> ImageHWC:
    plain_hwc = np.empty_like(like_hwc)
    plain_hwc[:] = colour
    return plain_hwc


def _answers(jobs: Sequence[Prepared], models: Models, stop: Stop) -> list[Answer]:
    found = found_in([job.region for job in jobs], models, stop)
    written = [index for index, job in enumerate(jobs) if job.job.params.prompt is not None]
    painted = dict(zip(written, _painted([(jobs[index], found[index].mask) for index in written], models, stop), strict=True))
    generator = None if models.generate is None else facts_of(models.generate, False)
    return [
        Answer(each.mask, painted.get(index), job.seed, generator or FACTS, each.segmenter)
        if index in painted
        else Answer(each.mask, None, None, FACTS, each.segmenter)
        for index, (job, each) in enumerate(zip(jobs, found, strict=True))
    ]


def _painted(asked: Sequence[tuple[Prepared, Mask]], models: Models, stop: Stop) -> list[ImageHWC]:
    """Backgrounds that were asked for in words; the model sees what stays."""
    if not asked:
        return []
    generator: Generator | None = models.generate
    assert generator is not None, "prepare gave these back"
    canvases = []
    for prepared, kept in asked:
        wish: Wish = prepared.job.params
        image_hwc = source_of(prepared.job).pixels_hwc
        height, width = image_hwc.shape[:2]
        side = min(SIDE_MAX, max(height, width, generator.side))
        behind_hw = ~kept.window_hw((0, 0, width, height))
        canvases.append(canvas(image_hwc, behind_hw, side, wish.prompt or "", wish.params, prepared.seed))
    return generator.generate(canvases, stop, progress_of(stop))
