"""Mask references of a row to masks: run lengths, polygons, images, and what earlier tasks left behind.

Enters: a `MaskSource`, and a `Job` whose images and datasets fetch has brought. Leaves: `Mask` values in pixels of the job's
image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import cv2
import numpy as np

from handlers._edges import Edges, combined, edges_of_mask, edges_of_rle, filled
from handlers._params import MaskSource
from handlers._rle import RleError, mask_of
from handlers.base import BlobRef, Inputs, Job, MasksRef, RejectedError
from models.base import Mask, pack

Read = TypeVar("Read")


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
    if source.polygon is not None:
        return [of_polygon(source.polygon, size_wh)]
    if source.image_url is not None:
        return [_of_image(source, job, size_wh)]
    return [_fitting(mask_of, source, rle, size_wh) for rle in _rles(source, job)]


def edges_of(source: MaskSource, job: Job, size_wh: tuple[int, int]) -> Iterator[Edges]:
    """As `masks_of`, one by one and without making pixels of run lengths; a task without masks gives one empty mask."""
    if source.polygon is not None or source.image_url is not None:
        yield from (edges_of_mask(mask, size_wh) for mask in masks_of(source, job, size_wh))
        return
    rles = _rles(source, job)
    for rle in rles:
        yield _fitting(edges_of_rle, source, rle, size_wh)
    if not rles:
        yield np.empty(0, dtype=np.int64)


def mask_from(source: MaskSource, job: Job, size_wh: tuple[int, int]) -> Mask:
    """The union of the masks that a reference means. Raises RejectedError."""
    if source.polygon is not None or source.image_url is not None:
        return masks_of(source, job, size_wh)[0]
    return filled(combined("union", edges_of(source, job, size_wh)), size_wh)


def image_size_of(source: MaskSource, job: Job) -> tuple[int, int] | None:
    """Width and height of the image that a reference's masks belong to; None for a polygon, which has none."""
    if source.task_id is not None:
        image = job.masks[_name(source)]["images"][0]
        return int(image["width"]), int(image["height"])
    if source.rle is not None:
        return source.rle.size[1], source.rle.size[0]
    return job.images[_name(source)].size_wh if source.image_url is not None else None


def _rles(source: MaskSource, job: Job) -> list[Mapping[str, Any]]:
    """The run lengths that a reference to a task, or one of run lengths, means."""
    if source.rle is not None:
        return [source.rle.model_dump()]
    annotations = {int(entry["id"]): entry for entry in job.masks[_name(source)]["annotations"]}
    wanted = list(annotations) if source.mask_ids is None else source.mask_ids
    missing = [mask_id for mask_id in wanted if mask_id not in annotations]
    if missing:
        raise RejectedError("mask_missing", f"Task {source.task_id} has no mask {missing[0]}; it has {len(annotations)}.")
    return [annotations[mask_id]["segmentation"] for mask_id in wanted]


def _fitting(
    read: Callable[[Mapping[str, Any], tuple[int, int]], Read],
    source: MaskSource,
    rle: Mapping[str, Any],
    size_wh: tuple[int, int],
) -> Read:
    """What `read` makes of run lengths; raises RejectedError where they do not fit the image."""
    try:
        return read(rle, size_wh)
    except RleError as error:
        which = "The mask given as rle" if source.task_id is None else f"A mask of task {source.task_id}"
        raise RejectedError("prompt_invalid", f"{which} does not fit this image: {error}.") from None


def _of_image(source: MaskSource, job: Job, size_wh: tuple[int, int]) -> Mask:
    image = job.images[_name(source)]
    if image.size_wh != size_wh:
        given, needed = f"{image.size_wh[0]} x {image.size_wh[1]}", f"{size_wh[0]} x {size_wh[1]}"
        raise RejectedError("prompt_invalid", f"The mask image has {given} pixels; it must have the {needed} of the image.")
    if image.alpha_hw is not None:  # its colours lie on white by now, so that only this tells inside from outside
        return pack(image.alpha_hw > 127)
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
