"""Bytes to arrays: what users upload becomes upright RGB, or is refused in one sentence.

Nothing is decoded before its size, declared in the header, is known to be within the limit; nothing outside the formats
named here is parsed at all. Decoding releases the GIL, so threads decode side by side.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image, ImageChops

from storage.base import InvalidImageError
from storage.blobs import too_large

HEIC_READABLE = importlib.util.find_spec("pillow_heif") is not None
"""Whether pillow-heif is installed, and so HEIC accepted."""

PIXELS_CEILING = 2 * (Image.MAX_IMAGE_PIXELS or 0)
"""Pillow's own bound (178,956,970 pixels), which also guards WEBP canvases and TIFF tiles: `pixels_max` cannot go above it."""

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF") + (("HEIF",) if HEIC_READABLE else ())
_NAMES = {"MPO": "JPEG", "HEIF": "HEIC"}
_HEIC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"mif1", b"msf1"})
_FOREIGN = {b"GIF8": "GIF", b"%PDF": "PDF", b"<svg": "SVG", b"8BPS": "Photoshop", b"\0\0\1\0": "ICO"}
_ACCEPTED = "JPEG, PNG, WEBP, BMP" + (", TIFF or HEIC" if HEIC_READABLE else " or TIFF")

_ORIENTATION_TAG = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What sets an image upright, by its EXIF orientation; 5 and above swap width and height."""

_PHOTOMETRIC_TAG, _BITS_TAG = 262, 258
_UNREADABLE_MODES = frozenset({"I", "F", "LAB", "HSV"})
_ALPHA_MODES = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})

_PROFILE_BYTES_MAX = 4_000_000
_QUICK = [cv2.IMWRITE_PNG_COMPRESSION, 1, cv2.IMWRITE_PNG_STRATEGY, cv2.IMWRITE_PNG_STRATEGY_HUFFMAN_ONLY]
"""Of a photo that makes fewer bytes in less time than looking for what repeats."""

_SCANS_MAX, _SEGMENTS_MAX = 100, 10_000
_START_OF_SCAN, _END_OF_IMAGE = 0xDA, 0xD9
_MARKER = re.compile(rb"\xff([^\x00\x01\xd0-\xd7\xff])")
"""A JPEG marker that begins a segment: no stuffed byte, no restart."""

if HEIC_READABLE:
    importlib.import_module("pillow_heif").register_heif_opener()
# Pillow warns of what is odd in a user's file, and of sizes that our own limit may allow: nothing that an operator could mend.
warnings.filterwarnings("ignore", module=r"PIL\.")


@dataclass(frozen=True, slots=True, eq=False)
class DecodedImage:
    """An uploaded image, upright by its EXIF orientation.

    `pixels_hwc` is RGB uint8 (height, width, 3), laid on white where it is transparent; `alpha_hw` uint8 (height, width), 255 =
    opaque, None where all is. Both are C-contiguous and read-only. `icc_profile` is the file's RGB colour profile; the pixels
    are not converted by it.
    """

    pixels_hwc: npt.NDArray[np.uint8]
    alpha_hw: npt.NDArray[np.uint8] | None
    size_wh: tuple[int, int]
    """Of the image, also where `pixels_hwc` was reduced."""
    content_hash: str
    """SHA-256 of the bytes, in hex."""
    format: str
    """JPEG, PNG, WEBP, BMP, TIFF or HEIC."""
    had_alpha: bool
    icc_profile: bytes | None = field(repr=False)


def decode(data: bytes, *, bytes_max: int, pixels_max: int, side_max: int | None = None) -> DecodedImage:
    """The first frame of an image file. `pixels_max` counts width times height, up to PIXELS_CEILING.

    With `side_max` the image is reduced to that long side, never enlarged: to the nearest pixel by Pillow's bilinear filter,
    which is how SAM and its kin see an image, so that they see the same in the copy.
    Raises InvalidImageError: image_too_large (bytes or declared pixels), image_invalid (anything else).
    """
    with _parsing(pixels_max):
        image = _open(data, bytes_max, pixels_max)
        if image.format in ("JPEG", "MPO") and _has_many_scans(data):
            raise _invalid("The image has too many scans; save it again.")
        image.load()
        name, profile, turn = image.format or "", _rgb_profile(image), _TURNS.get(_orientation(image))
        image, alpha = _flatten(image)  # each step lets go of the last one's pixels: 200 MB where there are 50 megapixels
        image = image if turn is None else image.transpose(turn)
        size_wh = image.size
        pixels_hwc = _upright(image if side_max is None else _reduced(image, side_max), None)
        had_alpha, see_through = alpha is not None, alpha is not None and alpha.getextrema() != (255, 255)
        alpha_hw = _upright(alpha, turn) if alpha is not None and see_through and side_max is None else None
    content_hash = hashlib.sha256(data).hexdigest()
    return DecodedImage(pixels_hwc, alpha_hw, size_wh, content_hash, _NAMES.get(name, name), had_alpha, profile)


def shape_of(data: bytes, *, bytes_max: int, pixels_max: int) -> tuple[int, int, int]:
    """Height, width and channels (4 where there may be alpha) of the upright image, from its header alone: nothing is decoded.

    Raises InvalidImageError as `decode` does, for what the header shows.
    """
    with _parsing(pixels_max):
        image = _open(data, bytes_max, pixels_max)
        width, height = image.size
        channels = 4 if image.mode in _ALPHA_MODES or "transparency" in image.info else 3
        return (width, height, channels) if _orientation(image) >= 5 else (height, width, channels)


def _upright(image: Image.Image, turn: Image.Transpose | None) -> npt.NDArray[np.uint8]:
    pixels: npt.NDArray[np.uint8] = np.ascontiguousarray(image if turn is None else image.transpose(turn), dtype=np.uint8)
    pixels.setflags(write=False)
    return pixels


def kept(pixels_hwc: npt.NDArray[np.uint8]) -> bytes:
    """Pixels as bytes that give the very same pixels back."""
    packed, data = cv2.imencode(".png", pixels_hwc[..., ::-1], _QUICK)
    assert packed
    return data.tobytes()


def unkept(data: bytes) -> npt.NDArray[np.uint8]:
    """What `kept` kept, RGB uint8 (height, width, 3); ValueError when it is something else."""
    pixels_hwc = cv2.imdecode(np.frombuffer(data, dtype=np.uint8), cv2.IMREAD_COLOR_RGB) if data else None
    if pixels_hwc is None:
        raise ValueError("this is no image that was kept")
    return np.asarray(pixels_hwc, dtype=np.uint8)


@contextmanager
def _parsing(pixels_max: int) -> Iterator[None]:
    """Turn whatever hostile or broken bytes make Pillow raise into the sentence that the user reads."""
    try:
        yield
    except (InvalidImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # a warning where Python is told -W error
        raise _too_many_pixels("too many", pixels_max) from error
    except Exception as error:  # the parsers raise struct.error, KeyError, zlib.error, …: there is no shorter list
        if "truncated" in str(error).lower():
            raise _invalid("The image is cut short: upload the whole file again.") from error
        raise _invalid(f"The file cannot be read as an image: send an intact {_ACCEPTED}.") from error


def _open(data: bytes, bytes_max: int, pixels_max: int) -> Image.Image:
    """Read the header, and refuse what is too large or of another format. Decodes nothing."""
    if len(data) > bytes_max:
        raise too_large(len(data), bytes_max)
    if refusal := _foreign(data):
        raise _invalid(refusal)
    image = Image.open(io.BytesIO(data), formats=_FORMATS)
    width, height = image.size
    if width < 1 or height < 1:
        raise _invalid("The image has no pixels: send one that is at least 1 x 1.")
    if width * height > min(pixels_max, PIXELS_CEILING):
        raise _too_many_pixels(f"{width} x {height}", pixels_max)
    return image


def _foreign(data: bytes) -> str | None:
    """Why bytes that belong to no accepted format are refused, where that can be told by name."""
    if not data:
        return "The file is empty: upload it again."
    if data[4:8] == b"ftyp":
        if data[8:12] in (b"avif", b"avis"):
            return f"AVIF is not read: send {_ACCEPTED}."
        if data[8:12] in _HEIC_BRANDS and not HEIC_READABLE:
            return f"HEIC is not read here, because pillow-heif is not installed: send {_ACCEPTED}."
    name = _FOREIGN.get(data[:4])
    return f"{name} is not read: send {_ACCEPTED}." if name else None


def _has_many_scans(jpeg: bytes) -> bool:
    """Whether decoding would go over the whole image again and again: a small file can ask for minutes of that.

    Its own segments alone count: what a camera appends (a preview, a film) is never decoded.
    """
    if jpeg.count(b"\xff\xda") <= _SCANS_MAX:
        return False
    scans, at = 0, 2
    for _ in range(_SEGMENTS_MAX):
        found = _MARKER.search(jpeg, at)
        if found is None or found[1][0] == _END_OF_IMAGE:
            return False
        scans += found[1][0] == _START_OF_SCAN
        if scans > _SCANS_MAX:
            return True
        at = found.end() + int.from_bytes(jpeg[found.end() : found.end() + 2], "big")
    return True


def _flatten(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The image as 8-bit RGB on white, and its alpha where anything of it was declared transparent."""
    if image.mode in _UNREADABLE_MODES:
        raise _invalid(f"The image stores {image.mode} pixels: save it as RGB or grey with 8 or 16 bits a channel.")
    if image.mode.startswith("I;16"):
        return _from_16_bit(image)
    if not image.has_transparency_data:
        return image if image.mode == "RGB" else image.convert("RGB"), None
    rgba = image if image.mode == "RGBA" else image.convert("RGBA")
    rgb, alpha = rgba.convert("RGB"), rgba.getchannel("A")
    rgb.paste((255, 255, 255), (0, 0, *rgb.size), ImageChops.invert(alpha))
    return rgb, alpha


def _from_16_bit(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 16 bits (12 in some TIFF) scaled to 8, where Pillow's own conversion would clip it."""
    tags: Any = getattr(image, "tag_v2", {})
    top = 2 ** tags.get(_BITS_TAG, (16,))[0] - 1
    values = np.minimum(np.arange(65536), top)
    scale = ((values * 255 + top // 2) // top).astype(np.uint8)
    if tags.get(_PHOTOMETRIC_TAG) == 0:  # the file calls 0 white
        scale = 255 - scale
    key, levels_hw = image.info.get("transparency"), np.asarray(image)
    if not isinstance(key, int):
        return Image.fromarray(scale[levels_hw]).convert("RGB"), None
    scale[key] = 255
    alpha = Image.fromarray(np.where(levels_hw == key, 0, 255).astype(np.uint8))
    return Image.fromarray(scale[levels_hw]).convert("RGB"), alpha


def _reduced(image: Image.Image, side: int) -> Image.Image:
    scale = side / max(image.size)
    if scale >= 1:
        return image
    width, height = (max(int(length * scale + 0.5), 1) for length in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation that is still to be applied, 1 to 8; Pillow has already applied that of TIFF and HEIC.

    Read from the EXIF block only: that is what browsers do, and users click on what a browser shows. A block that
    cannot be read turns nothing, as there.
    """
    exif = Image.Exif()
    try:
        exif.load(image.info.get("exif", b""))
        value = exif.get(_ORIENTATION_TAG, 1)
    except Exception:  # as hostile as the rest of the file, but not needed to see the picture
        return 1
    return value if value in range(1, 9) else 1


def _rgb_profile(image: Image.Image) -> bytes | None:
    """The colour profile, unless it describes a space (CMYK, grey) that the pixels are no longer in, or is no honest one."""
    profile = image.info.get("icc_profile")
    honest = isinstance(profile, bytes) and profile[16:20] == b"RGB " and len(profile) <= _PROFILE_BYTES_MAX
    return profile if honest else None


def _invalid(sentence: str) -> InvalidImageError:
    return InvalidImageError("image_invalid", sentence)


def _too_many_pixels(size: str, pixels_max: int) -> InvalidImageError:
    limit = min(pixels_max, PIXELS_CEILING)
    return InvalidImageError(
        "image_too_large", f"The image has {size} pixels; at most {limit:,} are accepted: send a smaller copy."
    )
