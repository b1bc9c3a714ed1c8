"""Image files for tests: honest ones by Pillow, and ones made by hand whose headers lie."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

RED, GREEN, BLUE, WHITE, BLACK = (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)
BROKEN_EXIF = b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"
PHOTO = Path(__file__).parents[2] / "daemon" / "photos" / "chelsea.jpg"


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    """An image as the bytes of a file."""
    target = io.BytesIO()
    image.save(target, format, **options)
    return target.getvalue()


def flag(width: int = 48, height: int = 32) -> Image.Image:
    """Red on the upper left, green on the upper right, blue below: no two orientations of it look alike."""
    pixels = np.full((height, width, 3), BLUE, dtype=np.uint8)
    pixels[: height // 2, : width // 2] = RED
    pixels[: height // 2, width // 2 :] = GREEN
    return Image.fromarray(pixels)


def close(pixels_hwc: npt.NDArray[np.uint8], expected: Image.Image, tolerance: int = 60) -> bool:
    """Whether nearly all pixels are alike; lossy formats blur the edges."""
    if pixels_hwc.shape[:2] != (expected.height, expected.width):
        return False
    distance = np.abs(pixels_hwc.astype(int) - np.asarray(expected.convert("RGB"), dtype=int)).max(axis=2)
    return bool((distance <= tolerance).mean() > 0.75)


def png(width: int, height: int, *chunks: tuple[bytes, bytes], bits: int = 8, colour: int = 2) -> bytes:
    """A PNG made by hand, whose header may lie."""
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IEND", b"")]
    framed = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in parts]
    return b"\x89PNG\r\n\x1a\n" + b"".join(framed)


def exif_of(orientation: int) -> Image.Exif:
    """An EXIF block that holds one tag."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def bmp(width: int, height: int) -> bytes:
    """A BMP that is nothing but a header."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)
    return b"BM" + struct.pack("<IHHI", 54 + len(header), 0, 0, 54) + header


def tiff(width: int, height: int, data: bytes = b"", *, bits: int = 8, photometric: int = 1, order: str = ">") -> bytes:
    """A TIFF of one grey channel in either byte order, whose header may lie."""
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric}
    tags |= {273: 8 + 2 + 12 * 9 + 4, 277: 1, 278: height, 279: len(data)}
    entries = b"".join(struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in tags.items())
    mark = b"MM\0*" if order == ">" else b"II*\0"
    return mark + struct.pack(f"{order}IH", 8, len(tags)) + entries + b"\0\0\0\0" + data


def webp(width: int, height: int) -> bytes:
    """A WEBP whose canvas is declared and holds no frame."""
    canvas = b"\x02\0\0\0" + struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
    parts = b"VP8X" + struct.pack("<I", 10) + canvas + b"ANIM" + struct.pack("<IIH", 6, 0, 0)
    return b"RIFF" + struct.pack("<I", 4 + len(parts)) + b"WEBP" + parts


def jpeg(width: int, height: int) -> bytes:
    """A small JPEG whose header was made to lie."""
    data = bytearray(saved(flag(16, 16), "JPEG"))
    at = data.index(b"\xff\xc0") + 5
    data[at : at + 4] = struct.pack(">HH", height, width)
    return bytes(data)


def heic_header(brand: bytes = b"heic") -> bytes:
    """The box that a HEIC, or a relative of it, begins with."""
    return struct.pack(">I", 24) + b"ftyp" + brand + b"\0\0\0\0" + b"mif1" + brand
