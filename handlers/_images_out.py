"""Pictures to files: PNG, JPEG or WEBP with the source's colour profile, and its transparency where the format has it.

Enters: RGB, alpha and what the row asks of the file. Leaves: a `Result` whose `result_image_url` is that file.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from pydantic import BeforeValidator, Field

from handlers._params import Strict
from handlers._prompts import source_of
from handlers.base import Job, RejectedError, Result, ResultBlob, SourceImage
from models.base import ImageHWC

ENGINE, DEVICE = "maskd", "cpu"
"""What results say of the kinds that need no model."""

FormatName = Literal["PNG", "JPEG", "WEBP"]
FILES = {"PNG": ("result.png", "image/png"), "JPEG": ("result.jpg", "image/jpeg"), "WEBP": ("result.webp", "image/webp")}
SIDES_MAX = {"PNG": 1_000_000, "JPEG": 65_500, "WEBP": 16_383}
"""Most pixels a side that the libraries write."""
QUALITY = 90
WEBP_METHOD = 2
"""0 to 6: how long the encoder looks for a smaller file. Its default, 4, takes twice as long for 4 % fewer bytes."""
STRIP_PIXELS = 1 << 20


def _format(value: Any) -> Any:
    name = value.upper() if isinstance(value, str) else value
    return "JPEG" if name == "JPG" else name


class Output(Strict):
    """What a row may ask of the file, in any case; `JPG` is read too."""

    format: Annotated[FormatName, BeforeValidator(_format)] | None = None
    quality: Annotated[int, Field(ge=1, le=100)] | None = None


@dataclass(frozen=True, slots=True)
class Picture:
    """RGB uint8 (height, width, 3) with its alpha (height, width), None where all is opaque; RGB is not laid on anything."""

    pixels_hwc: ImageHWC
    alpha_hw: npt.NDArray[np.uint8] | None
    icc_profile: bytes | None

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels_hwc.shape[1], self.pixels_hwc.shape[0]


def check_side(name: FormatName, size_wh: tuple[int, int]) -> None:
    """Raise RejectedError when the format cannot hold a picture of that size."""
    if max(size_wh) > SIDES_MAX[name]:
        raise RejectedError(
            "params_invalid",
            f"{name} holds at most {SIDES_MAX[name]} pixels a side, and the image would have {max(size_wh)}; "
            f"take another format, or a smaller image.",
        )


def picture_of(source: SourceImage) -> Picture:
    """The source as a picture of its own, which may be painted on."""
    pixels_hwc = source.pixels_hwc.copy()
    if source.alpha_hw is not None:
        _take_off_white(pixels_hwc, source.alpha_hw)
    return Picture(pixels_hwc, source.alpha_hw, source.icc_profile)


def result(
    job: Job, picture: Picture, name: FormatName, asked: Output, labels: Sequence[dict[str, Any]] = (), **extra: Any
) -> Result:
    """The file and the facts; `extra` goes into the metadata, its `warnings` first in the list."""
    source = source_of(job)
    quality = None if name == "PNG" else asked.quality or QUALITY
    warnings = list(extra.pop("warnings", ()))
    if name == "PNG" and asked.quality is not None:
        warnings.append("quality was not applied: PNG loses nothing")
    if name == "JPEG" and picture.alpha_hw is not None:
        warnings.append("JPEG has no transparency: what was transparent is laid on white")
    metadata = {
        "engine": ENGINE,
        "device": DEVICE,
        "image_width": source.size_wh[0],
        "image_height": source.size_wh[1],
        "result_width": picture.size_wh[0],
        "result_height": picture.size_wh[1],
        "format": name,
        "quality": quality,
        "warnings": warnings,
        **extra,
    }
    file_name, content_type = FILES[name]
    blob = ResultBlob("result_image_url", file_name, content_type, encoded(picture, name, quality or QUALITY))
    return Result((blob,), list(labels), metadata)


def encoded(picture: Picture, name: FormatName, quality: int) -> bytes:
    """The file; `quality` 1 to 100 means nothing to PNG."""
    if name == "PNG":
        return _png(picture)
    target, options = io.BytesIO(), {"quality": quality, "icc_profile": picture.icc_profile}
    if name == "JPEG":
        Image.fromarray(_on_white(picture)).save(target, "JPEG", **options)
        return target.getvalue()
    image = Image.fromarray(picture.pixels_hwc)
    if picture.alpha_hw is not None:
        image.putalpha(Image.fromarray(picture.alpha_hw))
    image.save(target, "WEBP", method=WEBP_METHOD, **options)
    return target.getvalue()


def _png(picture: Picture) -> bytes:
    """By OpenCV, which takes half as long as Pillow; the profile, which it does not write, goes behind the header chunk."""
    if picture.alpha_hw is None:
        bgr = cv2.cvtColor(picture.pixels_hwc, cv2.COLOR_RGB2BGR)
    else:
        bgr = cv2.cvtColor(picture.pixels_hwc, cv2.COLOR_RGB2BGRA)
        bgr[:, :, 3] = picture.alpha_hw
    data = cv2.imencode(".png", bgr)[1].tobytes()
    if picture.icc_profile is None:
        return data
    body = b"iCCP" + b"ICC Profile\0\0" + zlib.compress(picture.icc_profile)
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    header_end = 8 + 12 + 13
    return data[:header_end] + chunk + data[header_end:]


def _on_white(picture: Picture) -> ImageHWC:
    if picture.alpha_hw is None:
        return picture.pixels_hwc
    laid_hwc = picture.pixels_hwc.copy()
    for rows in _strips(picture.alpha_hw):
        alpha = picture.alpha_hw[rows, :, None].astype(np.int32)
        laid_hwc[rows] = 255 - ((255 - laid_hwc[rows].astype(np.int32)) * alpha + 127) // 255
    return laid_hwc


def _take_off_white(pixels_hwc: ImageHWC, alpha_hw: npt.NDArray[np.uint8]) -> None:
    """Undo, in place, that decoding lays transparent pixels on white. Seen on any ground the result is off by a level at most."""
    for rows in _strips(alpha_hw):
        alpha = np.maximum(alpha_hw[rows, :, None].astype(np.int32), 1)
        missing = ((255 - pixels_hwc[rows].astype(np.int32)) * 255 + alpha // 2) // alpha
        pixels_hwc[rows] = 255 - np.minimum(missing, 255)


def _strips(alpha_hw: npt.NDArray[np.uint8]) -> Iterator[slice]:
    """Rows in strips, those apart in which nothing is transparent."""
    height, width = alpha_hw.shape
    step = max(STRIP_PIXELS // max(width, 1), 1)
    for top in range(0, height, step):
        rows = slice(top, top + step)
        if alpha_hw[rows].min() < 255:
            yield rows
