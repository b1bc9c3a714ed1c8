"""Mask references of a row to masks: run lengths, polygons, images, and what earlier tasks left behind.

Enters: a `MaskSource`, and a `Job` whose images and datasets fetch has brought. Leaves: `Mask` values in pixels of the job's
image.
"""

from __future__ import annotations

from collections.abc import Iterable

import cv2
import numpy as np

from handlers._params import MaskSource
from handlers._rle import RleError, mask_of
from handlers.base import BlobRef, Inputs, Job, MasksRef, RejectedError
from models.base import Mask, pack


def inputs_of(sources: Iterable[MaskSource], blobs: tuple[BlobRef, ...] = ()) -> Inputs:
    """What fetch has to bring for these references (and `blobs` besides), each thing once."""
    masks: dict[str, MasksRef] = {}
    images = {blob.name: blob for blob in blobs}
    for source in sources:
        name = _name(source)
        if source.task_id is not None:
            ids = None if source.mask_ids is None else tuple(source.mask_ids)
            masks[name] = MasksRef(name, str(source.task_id), ids)
        elif source.image_url is not None:
            images[name] = BlobRef(name, source.image_url)
    return Inputs(blobs=tuple(images.values()), masks=tuple(masks.values()))


def _name(source: MaskSource) -> str:
    """The same reference has the same name, so that it is fetched once."""
    if source.task_id is not None:
        ids = "all" if source.mask_ids is None else ",".join(str(mask_id) for mask_id in source.mask_ids)
        return f"masks {source.task_id} {ids}"
    return f"mask {source.image_url}"


def masks_of(source: MaskSource, job: Job, size_wh: tuple[int, int]) -> list[Mask]:
    """The masks that a reference means, in an image of that size; several only for an earlier task. Raises RejectedError."""
    if source.task_id is not None:
        return _of_task(source, job, size_wh)
    if source.rle is not None:
        return [_of_rle(source.rle.model_dump(), size_wh, "The mask given as rle does not fit")]
    if source.polygon is not None:
        return [of_polygon(source.polygon, size_wh)]
    return [_of_image(source, job, size_wh)]


def mask_from(source: MaskSource, job: Job, size_wh: tuple[int, int]) -> Mask:
    """The union of the masks that a reference means. Raises RejectedError."""
    return union(masks_of(source, job, size_wh))


def union(masks: list[Mask]) -> Mask:
    """All masks as one, in the box around them."""
    filled = [mask for mask in masks if mask.bits.size]
    if len(filled) <= 1:
        return filled[0] if filled else pack(np.zeros((0, 0), dtype=np.bool_))
    boxes = np.array([mask.box_xyxy for mask in filled])
    x0, y0 = (int(value) for value in boxes[:, :2].min(axis=0))
    x1, y1 = (int(value) for value in boxes[:, 2:].max(axis=0))
    either_hw = np.zeros((y1 - y0, x1 - x0), dtype=np.bool_)
    for mask in filled:
        left, top, right, bottom = mask.box_xyxy
        either_hw[top - y0 : bottom - y0, left - x0 : right - x0] |= mask.crop_hw()
    return pack(either_hw, (x0, y0))


def _of_task(source: MaskSource, job: Job, size_wh: tuple[int, int]) -> list[Mask]:
    annotations = {int(entry["id"]): entry for entry in job.masks[_name(source)]["annotations"]}
    wanted = list(annotations) if source.mask_ids is None else source.mask_ids
    missing = [mask_id for mask_id in wanted if mask_id not in annotations]
    if missing:
        raise RejectedError("mask_missing", f"Task {source.task_id} has no mask {missing[0]}; it has {len(annotations)}.")
    problem = f"A mask of task {source.task_id} does not fit this image"
    return [_of_rle(annotations[mask_id]["segmentation"], size_wh, problem) for mask_id in wanted]


def _of_rle(rle: dict[str, object], size_wh: tuple[int, int], problem: str) -> Mask:
    try:
        return mask_of(rle, size_wh)
    except RleError as error:
        raise RejectedError("prompt_invalid", f"{problem}: {error}.") from None


def _of_image(source: MaskSource, job: Job, size_wh: tuple[int, int]) -> Mask:
    image = job.images[_name(source)]
    if image.size_wh != size_wh:
        given, needed = f"{image.size_wh[0]} x {image.size_wh[1]}", f"{size_wh[0]} x {size_wh[1]}"
        raise RejectedError("prompt_invalid", f"The mask image has {given} pixels; it must have the {needed} of the image.")
    return pack(cv2.inRange(image.pixels_hwc, (0, 0, 0), (127, 127, 127)) == 0)


def of_polygon(polygon: list[tuple[float, float]], size_wh: tuple[int, int]) -> Mask:
    """The pixels whose centres lie inside a polygon (even-odd rule, corners in pixels of the image), clipped to the image."""
    ring_xy = np.array(polygon, dtype=np.float64)
    width, height = size_wh
    low, high = np.floor(ring_xy.min(axis=0)), np.ceil(ring_xy.max(axis=0))
    x0, x1 = (int(np.clip(value, 0, width)) for value in (low[0], high[0]))
    y0, y1 = (int(np.clip(value, 0, height)) for value in (low[1], high[1]))
    flips = np.zeros((y1 - y0, x1 - x0 + 1), dtype=np.bool_)
    for (ax, ay), (bx, by) in zip(ring_xy, np.roll(ring_xy, -1, axis=0), strict=True):
        first, last = (int(np.clip(np.ceil(y - 0.5), y0, y1)) for y in sorted((ay, by)))
        rows = np.arange(first, last)
        if rows.size:
            crossings_x = ax + (rows + 0.5 - ay) * (bx - ax) / (by - ay)
            flips[rows - y0, np.clip(np.ceil(crossings_x - 0.5), x0, x1).astype(int) - x0] ^= True
    return pack(np.logical_xor.accumulate(flips, axis=1)[:, :-1], (x0, y0))
