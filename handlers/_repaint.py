"""New pixels into a picture: blended inside a mask only, so that everything outside stays as it was, bit by bit.

Enters: patches of a model and the mask that they are for. Leaves: the file, the mask that was used, and the facts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from handlers import _images_out
from handlers._images_out import Output, check_side
from handlers._images_out import Picture as Painting
from handlers._instances import Facts, Instance
from handlers._instances import result as instances_result
from handlers._prompts import source_of
from handlers.base import Job, Result
from models.base import ImageHWC, Mask, Patch

FEATHER_PIXELS = 3
"""Over how many pixels, inside the mask, the new fades into the old."""


def paste(canvas_hwc: ImageHWC, mask: Mask, patches: Iterable[Patch], feather_pixels: int) -> None:
    """Put patches into the canvas, in place, where the mask is: faint at its rim, whole further inside."""
    size_wh = canvas_hwc.shape[1], canvas_hwc.shape[0]
    for patch in patches:
        x0, y0, x1, y1 = patch.box_xyxy
        crop_hwc = canvas_hwc[y0:y1, x0:x1]
        crop_hwc[:] = blended(crop_hwc, patch.pixels_hwc, share_in(mask, patch.box_xyxy, size_wh, feather_pixels))


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
        share_hw = np.minimum(depth_hw * (255 / (feather_pixels + 1)), 255).astype(np.uint8)
        share_hw[(inside_hw > 0) & (share_hw == 0)] = 1
    else:
        share_hw = inside_hw * np.uint8(255)
    share: npt.NDArray[np.uint8] = share_hw[y0 - wide[1] : y1 - wide[1], x0 - wide[0] : x1 - wide[0]]
    return share


def blended(old_hwc: ImageHWC, new_hwc: ImageHWC, share_hw: npt.NDArray[np.uint8]) -> ImageHWC:
    """`share_hw` / 255 of the new over the old, rounded; where it is 0 the old, where it is 255 the new, exactly."""
    share = share_hw[:, :, None].astype(np.int32)
    mixed = old_hwc * (255 - share) + new_hwc * share
    return ((mixed + 127) // 255).astype(np.uint8)


def result(
    job: Job, painting: Painting, asked: Output, used: Mask, label: str, facts: Facts, segmenter: Facts | None, **extra: Any
) -> Result:
    """The picture, and the mask that was used, as segmenting kinds give masks; `extra` goes into the metadata."""
    name = asked.format or "PNG"
    check_side(name, painting.size_wh)
    instances = [Instance(used, label)] if used.bits.size else []
    if segmenter is not None:
        extra["segmenter"] = segmenter.engine
    picture = _images_out.result(job, painting, name, asked, warnings=extra.pop("warnings", ()))
    masks = instances_result(job, instances, source_of(job).size_wh, facts, **extra)
    metadata = {**picture.metadata, **masks.metadata, "warnings": [*picture.metadata["warnings"], *masks.metadata["warnings"]]}
    return Result((*picture.blobs, *masks.blobs), masks.labels, metadata)
