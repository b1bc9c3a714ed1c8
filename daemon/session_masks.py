"""Masks of sessions as bytes and text: a reference that holds the whole mask, and all masks of an image with quick look-up.

Enters: `Mask` values. Leaves: what a client or a store keeps, and masks again. Nothing here remembers anything.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from handlers._rle import RleError, compressed, counts_of, mask_of
from handlers.base import RejectedError
from models.base import Mask

REFERENCE_BYTES_MAX = 500_000
"""Of the run lengths in a reference, once inflated."""
HEAD = struct.Struct(">I")

SizeWH = tuple[int, int]


def reference_of(mask: Mask, size_wh: SizeWH) -> str:
    """A mask as text that needs no state to be understood: its size and run lengths, deflated, in base64url."""
    text = f"{size_wh[0]} {size_wh[1]} {compressed(counts_of(mask, size_wh))}"
    return base64.urlsafe_b64encode(zlib.compress(text.encode(), 6)).decode().rstrip("=")


def referred(reference: str, size_wh: SizeWH) -> Mask:
    """The mask of a reference, in an image of that size; RejectedError when it is none, or of an image of another size."""
    problem = RejectedError("prompt_invalid", "The mask_ref cannot be read: send one exactly as an earlier answer gave it.")
    try:
        packed = base64.b64decode(reference + "=" * (-len(reference) % 4), altchars=b"-_", validate=True)
        inflated = zlib.decompressobj().decompress(packed, REFERENCE_BYTES_MAX)
        width, height, counts = inflated.decode("ascii").split(" ")
        size = [int(height), int(width)]
    except (binascii.Error, zlib.error, ValueError) as error:
        raise problem from error
    return drawn({"size": size, "counts": counts}, size_wh)


def drawn(rle: dict[str, Any], size_wh: SizeWH) -> Mask:
    """The mask of COCO run lengths; RejectedError when they do not fit the image, or hold nothing."""
    try:
        mask = mask_of(rle, size_wh)
    except (RleError, OverflowError) as error:
        raise RejectedError("prompt_invalid", f"The mask does not fit the image: {error}.") from None
    if not mask.bits.size:
        raise RejectedError("prompt_invalid", "The mask that is meant as a prompt is empty.")
    return mask


def packed(masks: Sequence[Mask], size_wh: SizeWH) -> bytes:
    """All masks of an image: a list of what they are, then each one's bits, deflated by itself."""
    bits = [zlib.compress(mask.bits.tobytes(), 1) for mask in masks]
    entries = [
        {"id": index + 1, "score": mask.score, "box": list(mask.box_xyxy), "area": mask.area, "bytes": len(own)}
        for index, (mask, own) in enumerate(zip(masks, bits, strict=True))
    ]
    head = json.dumps({"width": size_wh[0], "height": size_wh[1], "masks": entries}).encode()
    return b"".join([HEAD.pack(len(head)), head, *bits])


def listed(data: bytes) -> dict[str, Any]:
    """What they are: width, height, and per mask id, box, area and score."""
    document = _document(data)
    masks = [{name: entry[name] for name in ("id", "box", "area", "score")} for entry in document["masks"]]
    return {"masks": masks, "width": document["width"], "height": document["height"]}


def smallest_at(data: bytes, x: float, y: float) -> tuple[dict[str, Any], Mask] | None:
    """What the smallest mask at that pixel is, and the mask; None where there is none. Only masks whose box is there are read."""
    column, row = int(x), int(y)
    there = [
        (entry, first)
        for entry, first in _entries(data)
        if entry["box"][0] <= column < entry["box"][2] and entry["box"][1] <= row < entry["box"][3]
    ]
    for entry, first in sorted(there, key=lambda found: found[0]["area"]):
        x0, y0, x1, y1 = entry["box"]
        flat = np.frombuffer(zlib.decompress(data[first : first + entry["bytes"]]), dtype=np.uint8)
        bits = flat.reshape(y1 - y0, -(-(x1 - x0) // 8))
        if bits[row - y0, (column - x0) // 8] >> (7 - (column - x0) % 8) & 1:
            return entry, Mask((x0, y0, x1, y1), bits, entry["score"])
    return None


def _document(data: bytes) -> dict[str, Any]:
    (length,) = HEAD.unpack_from(data)
    document: dict[str, Any] = json.loads(data[HEAD.size : HEAD.size + length])
    return document


def _entries(data: bytes) -> Iterator[tuple[dict[str, Any], int]]:
    """Each mask's entry and where its bits begin."""
    (length,) = HEAD.unpack_from(data)
    first = HEAD.size + length
    for entry in _document(data)["masks"]:
        yield entry, first
        first += entry["bytes"]
