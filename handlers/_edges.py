"""Masks as edges: where, counted column by column, a mask begins and ends. Any number of them combine by one sort.

Enters: run lengths or `Mask` values. Leaves: edges, and a `Mask` of them. No array of pixels is made.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from handlers._rle import RleError, counts_of, expanded
from models.base import Mask

Edges = npt.NDArray[np.int64]
"""Ascending; a mask begins at each even place and ends at the odd one after it."""
Operation = Literal["union", "intersection", "difference", "xor"]

EDGES_MAX = 1 << 22
"""Most edges that are kept before they are combined with what came before: 32 MiB, and some times that while sorting."""


def edges_of_mask(mask: Mask, size_wh: tuple[int, int]) -> Edges:
    """The edges of a mask in an image of that size."""
    return _edges(np.cumsum(counts_of(mask, size_wh)))


def edges_of_rle(rle: Mapping[str, Any], size_wh: tuple[int, int]) -> Edges:
    """The edges of a COCO `segmentation` (compressed or a list) of an image of that size; raises RleError as `mask_of` does."""
    width, height = size_wh
    given, counts = list(rle.get("size", ())), rle.get("counts")
    if given != [height, width]:
        raise RleError(f"its size is {given}, but the image has {height} rows and {width} columns")
    runs = expanded(counts) if isinstance(counts, str) else [int(count) for count in counts or ()]
    if min(runs, default=0) < 0 or sum(runs) != width * height:
        raise RleError(f"its run lengths do not add up to the {width * height} pixels of the image")
    return _edges(np.cumsum(np.array(runs, dtype=np.int64)))


def _edges(ends: Edges) -> Edges:
    """Of the ends of all runs; the last is an edge only where the last run is inside."""
    return ends[: len(ends) // 2 * 2]


def combined(operation: Operation, masks: Iterable[Edges]) -> Edges:
    """The edges of all masks together; `difference` is the first one without the others. None at all are an empty mask."""
    held: list[Edges] = []
    size = 0
    for edges in masks:
        held.append(edges)
        size += edges.size
        if size > EDGES_MAX:
            held = [_together(operation, held)]
            size = held[0].size
    return _together(operation, held) if held else np.empty(0, dtype=np.int64)


def _together(operation: Operation, masks: Sequence[Edges]) -> Edges:
    """Between two neighbouring edges all masks stay as they are: how many of them lie there says whether the result does."""
    positions = np.concatenate(masks)
    steps = np.ones(len(positions), dtype=np.int64)
    steps[1::2] = -1
    if operation == "difference":
        steps[: len(masks[0])] *= len(masks)  # outweighs all others
    order = np.argsort(positions, kind="stable")  # merges what is sorted already
    positions, depths = positions[order], np.cumsum(steps[order])
    last = np.append(positions[1:] != positions[:-1], True)[: len(positions)]
    positions, depths = positions[last], depths[last]
    match operation:
        case "union":
            inside = depths > 0
        case "xor":
            inside = depths % 2 == 1
        case "intersection" | "difference":
            inside = depths == len(masks)
    changes: Edges = positions[np.diff(inside, prepend=False)]
    return changes


def filled(edges: Edges, size_wh: tuple[int, int]) -> Mask:
    """The mask of these edges, which `combined` has made, as packed bits all the way.

    Going down a column, a bit changes at each edge; at its top it begins as the column before it ended.
    """
    height = size_wh[1]
    if not edges.size:
        return Mask((0, 0, 0, 0), np.zeros((0, 0), dtype=np.uint8))
    x0, x1 = int(edges[0]) // height, (int(edges[-1]) - 1) // height + 1
    tops = np.arange(x0, x1) * height
    tops = tops[np.searchsorted(edges, tops) % 2 == 1]
    ends = edges[edges < x1 * height]
    columns, rows = np.divmod(np.concatenate([ends, tops]), height)
    columns -= x0
    bits = np.zeros((height, -(-(x1 - x0) // 8)), dtype=np.uint8)
    np.bitwise_xor.at(bits, (rows, columns // 8), (128 >> columns % 8).astype(np.uint8))
    np.bitwise_xor.accumulate(bits, axis=0, out=bits)
    filled_rows = np.flatnonzero(bits.any(axis=1))
    y0, y1 = int(filled_rows[0]), int(filled_rows[-1]) + 1
    return Mask((x0, y0, x1, y1), bits[y0:y1].copy())
