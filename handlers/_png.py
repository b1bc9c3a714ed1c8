"""The mask image: an indexed PNG whose pixel value is the mask id, RGBA above 255 masks.

Enters: masks in order of id, their colours, the image's size. Leaves: PNG bytes (W3C PNG, third edition). One small id per
pixel is all that is ever held at full size.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt

from models.base import Mask

Colour = tuple[int, int, int]
Ids = npt.NDArray[np.uint8] | npt.NDArray[np.int32]
Bytes = npt.NDArray[np.uint8]

INDEXED_MAX = 255
STRIP_PIXELS = 1 << 20
INDEXED, RGBA = 3, 6
NO_FILTER, SUB_FILTER = 0, 1


def mask_png(masks: Sequence[Mask], palette: Sequence[Colour], size_wh: tuple[int, int]) -> bytes:
    """Mask k is drawn as id k + 1 in `palette[k]`, small masks on top of large ones; id 0 is background and transparent."""
    ids_hw = painted(masks, size_wh)
    if len(masks) > INDEXED_MAX:
        return _png(size_wh, 8, RGBA, (), _rgba_strips(ids_hw, palette))
    depth = next(bits for bits in (1, 2, 4, 8) if len(masks) < 1 << bits)
    colours = bytes(3) + b"".join(bytes(colour) for colour in palette)
    chunks = ((b"PLTE", colours), (b"tRNS", b"\0"))
    return _png(size_wh, depth, INDEXED, chunks, _index_strips(ids_hw, depth))


def painted(masks: Sequence[Mask], size_wh: tuple[int, int]) -> Ids:
    """The id of the smallest mask at each pixel, 0 where there is none; uint8 up to 255 masks, else int32."""
    dtype = np.uint8 if len(masks) <= INDEXED_MAX else np.int32
    ids_hw: npt.NDArray[Any] = np.zeros((size_wh[1], size_wh[0]), dtype=dtype)
    areas = [mask.area for mask in masks]
    for index in sorted(range(len(masks)), key=lambda index: -areas[index]):
        x0, y0, x1, y1 = masks[index].box_xyxy
        crop_hw = masks[index].crop_hw()
        cv2.copyTo(np.full(crop_hw.shape, index + 1, dtype=dtype), crop_hw.view(np.uint8), ids_hw[y0:y1, x0:x1])
    return ids_hw


def _png(
    size_wh: tuple[int, int], depth: int, colour_type: int, chunks: Iterable[tuple[bytes, bytes]], strips: Iterator[Bytes]
) -> bytes:
    """The file; `strips` are filtered rows."""
    packer = zlib.compressobj(1, zlib.DEFLATED, 15, 9, zlib.Z_RLE)
    pixels = b"".join([*(packer.compress(strip.data) for strip in strips), packer.flush()])
    header = struct.pack(">IIBBBBB", *size_wh, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", pixels), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(name, data) for name, data in parts)


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))


def _strips(ids_hw: Ids) -> Iterator[Ids]:
    rows = max(STRIP_PIXELS // max(ids_hw.shape[1], 1), 1)
    for top in range(0, ids_hw.shape[0], rows):
        yield ids_hw[top : top + rows]


def _index_strips(ids_hw: Ids, depth: int) -> Iterator[Bytes]:
    """Rows of ids, `8 / depth` of them a byte, the first in the high bits."""
    per_byte = 8 // depth
    for strip_hw in _strips(ids_hw):
        height, width = strip_hw.shape
        rows = np.zeros((height, 1 + -(-width // per_byte)), dtype=np.uint8)
        for place in range(per_byte):
            ids = strip_hw[:, place::per_byte]
            rows[:, 1 : 1 + ids.shape[1]] |= (ids << (8 - depth * (place + 1))).astype(np.uint8)
        yield rows


def _rgba_strips(ids_hw: Ids, palette: Sequence[Colour]) -> Iterator[Bytes]:
    """Rows of colours, each less its left neighbour, so that a run of one colour is a run of zeros."""
    table = np.zeros((len(palette) + 1, 4), dtype=np.uint8)
    table[1:, :3] = palette
    table[1:, 3] = 255
    for strip_hw in _strips(ids_hw):
        pixels = table[strip_hw].reshape(strip_hw.shape[0], -1)
        rows = np.full((pixels.shape[0], 1 + pixels.shape[1]), SUB_FILTER, dtype=np.uint8)
        rows[:, 1:5] = pixels[:, :4]
        np.subtract(pixels[:, 4:], pixels[:, :-4], out=rows[:, 5:])
        yield rows
