"""New pixels into a picture: blended inside a mask only, so that everything outside stays as it was, bit by bit.

Enters: patches of a model and the mask that they are for. Leaves: the file, the mask that was used, and the facts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from handlers import _images_out
from handlers._images_out import STRIP_PIXELS, FormatName, Output, check_side
from handlers._images_out import Picture as Painting
from handlers._instances import Facts, Instance
from handlers._instances import result as instances_result
from handlers._prompts import source_of
from handlers.base import Job, Result
from models.base import ImageHWC, Mask, Patch

FEATHER_PIXELS = 3
"""Over how many pixels, inside the mask, the new fades into the old."""


def check_output(job: Job, asked: Output) -> None:
    """Raise RejectedError when the file cannot hold the job's image."""
    check_side(_format(asked), source_of(job).size_wh)


def paste(
    canvas_hwc: ImageHWC,
    mask: Mask,
    patches: Iterable[Patch],
    feather_pixels: int,
    alpha_hw: npt.NDArray[np.uint8] | None = None,
) -> None:
    """Put patches into the canvas, in place, where the mask is: faint at its rim, whole further inside. Where there is alpha,
    it becomes opaque there, and what could not be seen lends the new no colour."""
    size_wh = canvas_hwc.shape[1], canvas_hwc.shape[0]
    for patch in patches:
        x0, y0, x1, y1 = patch.box_xyxy
        for top, bottom in strips(x1 - x0, y0, y1):
            share_hw = share_in(mask, (x0, top, x1, bottom), size_wh, feather_pixels)
            if alpha_hw is not None:
                seen_hw = alpha_hw[top:bottom, x0:x1]
                share_hw = np.where(share_hw > 0, np.maximum(share_hw, 255 - seen_hw), 0).astype(np.uint8)
                seen_hw[share_hw > 0] = 255
            crop_hwc = canvas_hwc[top:bottom, x0:x1]
            blend(crop_hwc, patch.pixels_hwc[top - y0 : bottom - y0], share_hw, crop_hwc)


def strips(width: int, top: int, bottom: int) -> Iterator[tuple[int, int]]:
    """The rows from `top` to `bottom` in strips (first, end) of about a megapixel, so that the work needs little memory."""
    step = max(STRIP_PIXELS // max(width, 1), 1)
    for first in range(top, bottom, step):
        yield first, min(first + step, bottom)


def share_in(
    mask: Mask, box_xyxy: tuple[int, int, int, int], size_wh: tuple[int, int], feather_pixels: int
) -> npt.NDArray[np.uint8]:
    """How much of the new shows at each pixel of a box: 0 outside the mask, rising to 255 over `feather_pixels` inside it. The
    image's own border is no rim."""
    x0, y0, x1, y1 = box_xyxy
    reach = feather_pixels + 1
    wide = max(x0 - reach, 0), max(y0 - reach, 0), min(x1 + reach, size_wh[0]), min(y1 + reach, size_wh[1])
    inside_hw = mask.window_hw(wide).view(np.uint8)
    if feather_pixels:
        depth_hw = cv2.distanceTransform(inside_hw, cv2.DIST_L2, 3)
        share_hw = rising(depth_hw, reach)
        share_hw[(inside_hw > 0) & (share_hw == 0)] = 1
    else:
        share_hw = inside_hw * np.uint8(255)
    share: npt.NDArray[np.uint8] = share_hw[y0 - wide[1] : y1 - wide[1], x0 - wide[0] : x1 - wide[0]]
    return share


def rising(depth_hw: npt.NDArray[Any], reach: int) -> npt.NDArray[np.uint8]:
    """0 to 255 as the depth goes from 0 to `reach`. A depth of no edge at all is too large to be multiplied."""
    share: npt.NDArray[np.uint8] = (np.minimum(depth_hw, reach) * (255 / reach)).astype(np.uint8)
    return share


def blend(old_hwc: ImageHWC, new_hwc: ImageHWC, share_hw: npt.NDArray[np.uint8], into_hwc: ImageHWC) -> None:
    """`share_hw` / 255 of the new over the old, rounded; where it is 0 the old, where it is 255 the new, exactly. `into_hwc` may
    be either of them."""
    between_hw = (share_hw > 0) & (share_hw < 255)
    share = share_hw[between_hw][:, None].astype(np.int32)
    mixed = (old_hwc[between_hw] * (255 - share) + new_hwc[between_hw] * share + 127) // 255
    if into_hwc is not old_hwc:
        cv2.copyTo(old_hwc, (share_hw == 0).view(np.uint8), into_hwc)
    if into_hwc is not new_hwc:
        cv2.copyTo(new_hwc, (share_hw == 255).view(np.uint8), into_hwc)
    into_hwc[between_hw] = mixed


def result(
    job: Job, painting: Painting, asked: Output, used: Mask, label: str, facts: Facts, segmenter: Facts | None, **extra: Any
) -> Result:
    """The picture, and the mask that was used, as segmenting kinds give masks; `extra` goes into the metadata."""
    instances = [Instance(used, label)] if used.bits.size else []
    if segmenter is not None:
        extra["segmenter"] = segmenter.engine
    picture = _images_out.result(job, painting, _format(asked), asked, warnings=extra.pop("warnings", ()))
    masks = instances_result(job, instances, source_of(job).size_wh, facts, **extra)
    metadata = {**picture.metadata, **masks.metadata, "warnings": [*picture.metadata["warnings"], *masks.metadata["warnings"]]}
    return Result((*picture.blobs, *masks.blobs), masks.labels, metadata)


def _format(asked: Output) -> FormatName:
    return asked.format or "PNG"
