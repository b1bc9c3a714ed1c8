"""Masks as COCO run lengths and back, without a full-size array per mask.

COCO counts pixels column by column from the top left, starting with those outside; its compressed form is documented only by
its source (maskApi.c of cocoapi): 5 bits a character from "0", deltas to the count two before from the fourth on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from models.base import Mask, pack

CHARACTERS_MAX = 8
"""Most characters of one number: 40 bits, more than any image has pixels."""

Counts = npt.NDArray[np.int64]


class RleError(ValueError):
    """These are not run lengths of a mask of that size; the message is one sentence."""


def counts_of(mask: Mask, size_wh: tuple[int, int]) -> Counts:
    """The run lengths of a mask in an image of that size: outside, inside, outside, …"""
    width, height = size_wh
    edges = _edges(mask, height)
    # A run that ends at the bottom of one column and one that begins at the top of the next are one run.
    joined = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
    edges = np.delete(edges, np.concatenate([joined, joined + 1]))
    counts = np.diff(edges, prepend=0, append=width * height)
    return counts if counts[-1] else counts[:-1]


def _edges(mask: Mask, height: int) -> Counts:
    """Where, counted column by column, each run of one column begins and ends: ascending, begin, end, begin, …

    A pixel unlike the one above it is an edge. That is one XOR of rows of packed bits, of which few bytes are not 0.
    """
    x0, y0, _, _ = mask.box_xyxy
    rows, row_bytes = mask.bits.shape
    unlike = np.zeros((rows + 1, row_bytes), dtype=np.uint8)
    unlike[:-1] = mask.bits
    unlike[1:] ^= mask.bits
    y, x = np.divmod(np.flatnonzero(unlike.ravel() != 0), max(row_bytes, 1))
    which, bit = np.nonzero(np.unpackbits(unlike[y, x, None], axis=1))
    edges: Counts = (x0 + 8 * x[which] + bit) * height + y0 + y[which]
    edges.sort()
    return edges


def compressed(counts: npt.ArrayLike) -> str:
    """Run lengths as COCO's string."""
    deltas = np.array(counts, dtype=np.int64)
    deltas[3:] -= deltas[1:-2].copy()
    characters = np.zeros((len(deltas), CHARACTERS_MAX), dtype=np.uint8)
    going = np.ones(len(deltas), dtype=np.bool_)
    for place in range(CHARACTERS_MAX):
        bits, deltas = deltas & 31, deltas >> 5
        more = deltas != np.where(bits & 16, -1, 0)
        characters[:, place] = np.where(going, 48 + bits + 32 * more, 0)
        going &= more
        if not going.any():
            break
    return characters[characters > 0].tobytes().decode("ascii")


def expanded(text: str) -> list[int]:
    """COCO's string as run lengths; raises RleError."""
    counts: list[int] = []
    value, shift = 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 40:
            raise RleError("the run lengths are not COCO's compressed form")
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (1 << shift) if bits & 16 else 0
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value, shift = 0, 0
    if shift:
        raise RleError("the run lengths end in the middle of a number")
    return counts


def segmentation(mask: Mask, size_wh: tuple[int, int]) -> dict[str, Any]:
    """COCO's `segmentation`: {"size": [height, width], "counts": string}."""
    return {"size": [size_wh[1], size_wh[0]], "counts": compressed(counts_of(mask, size_wh))}


def mask_of(rle: Mapping[str, Any], size_wh: tuple[int, int]) -> Mask:
    """The mask of a COCO `segmentation` (compressed or a list) of an image of that size; raises RleError."""
    width, height = size_wh
    if list(rle.get("size", ())) != [height, width]:
        raise RleError(f"its size is {list(rle.get('size', ()))}, but the image has {height} rows and {width} columns")
    counts = rle.get("counts")
    runs = expanded(counts) if isinstance(counts, str) else [int(count) for count in counts or ()]
    if any(run < 0 for run in runs) or sum(runs) != width * height:
        raise RleError(f"its run lengths do not add up to the {width * height} pixels of the image")
    return _from_runs(np.array(runs, dtype=np.int64), height)


def _from_runs(runs: Counts, height: int) -> Mask:
    """Fill only the columns that hold a run."""
    ends = np.cumsum(runs)
    inside = runs[1::2] > 0
    starts, stops = (ends - runs)[1::2][inside], ends[1::2][inside]
    if not starts.size:
        return pack(np.zeros((0, 0), dtype=np.bool_))
    x0, x1 = int(starts[0]) // height, (int(stops[-1]) - 1) // height + 1
    steps = np.zeros((x1 - x0) * height + 1, dtype=np.int8)
    np.add.at(steps, starts - x0 * height, 1)
    np.add.at(steps, stops - x0 * height, -1)
    column_major = np.cumsum(steps[:-1], dtype=np.int8).view(np.bool_)
    return pack(column_major.reshape(x1 - x0, height).T, (x0, 0))
