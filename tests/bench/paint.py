"""Painting: five masks of 15 % each on a photo of 12 megapixels, one thread. The obvious way blends whole images as floats.

Both sides begin with ready masks, each in its own form, and end with the painted pixels; encoding is shown beside.
"""

from __future__ import annotations

import json
import time
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from bench.blobs import blob
from bench.child import answer
from bench.ground import Ground
from bench.report import Report, ratios
from PIL import Image
from support.photos import photo

from handlers._images_out import FILES, QUALITY, Picture, encoded
from handlers.paint_masks import paint
from models.base import ImageHWC, Mask, MaskHW, pack

MASKS, SHARE, SIZE_WH = 5, 0.15, (4000, 3000)
COLOURS = ((255, 0, 0), (0, 128, 255), (255, 200, 0), (40, 40, 40), (0, 255, 120))
OPACITY = 0.7
ROUNDS = 5
LEVELS_MAX = 2
"""How far the two sides may differ: the obvious one cuts fractions off, ours rounds after each layer."""


def run(_: Ground, report: Report) -> None:
    """Both sides in one process, neighbours in time."""
    report.title("paint", f"{MASKS} masks of {SHARE:.0%} each on 12 megapixels, one thread")
    found = answer("bench.paint")
    report.side("ours (levels by table, in the mask's box)", found["ours"], "ms")
    report.side("obvious (floats, whole image)", found["obvious"], "ms")
    report.at_least("obvious / ours", ratios(found["obvious"], found["ours"]), 5)
    report.at_most("levels that the two differ by at most", [found["levels"]], LEVELS_MAX)
    for name in FILES:
        report.side(f"encode as {name}", found[name], "ms")


def masks() -> list[Mask]:
    """Blobs of equal size, all over the image."""
    random, found = np.random.default_rng(5), []
    side = int(2.4 * np.sqrt(SHARE * SIZE_WH[0] * SIZE_WH[1] / np.pi))
    for _ in range(MASKS):
        shape_hw = blob(random, 256, 256 / 2.4, (128.0, 128.0)) > 0
        crop_hw = cv2.resize(shape_hw.astype(np.float32), (side, side)) > 0.5
        x, y = (int(random.uniform(0, most - side)) for most in SIZE_WH)
        found.append(pack(crop_hw, (x, y)))
    return found


def ours(image_hwc: ImageHWC, painted: list[Mask]) -> ImageHWC:
    """As the handler does it."""
    canvas_hwc = image_hwc.copy()
    for mask, colour in zip(painted, COLOURS, strict=True):
        paint(canvas_hwc, mask, colour, OPACITY)
    return canvas_hwc


def obvious(image_hwc: ImageHWC, painted: list[MaskHW]) -> ImageHWC:
    """Every pixel of every layer."""
    canvas: npt.NDArray[np.float32] = image_hwc.astype(np.float32)
    for mask_hw, colour in zip(painted, COLOURS, strict=True):
        weight = mask_hw[:, :, None].astype(np.float32) * np.float32(OPACITY)
        canvas = canvas * (1 - weight) + np.array(colour, dtype=np.float32) * weight
    return canvas.astype(np.uint8)


def times() -> dict[str, Any]:
    """Milliseconds of both sides and of encoding, round by round, and how far the pixels differ."""
    image_hwc = np.asarray(Image.fromarray(photo("astronaut")).resize(SIZE_WH, Image.Resampling.BICUBIC))
    packed = masks()
    full = [mask.window_hw((0, 0, *SIZE_WH)) for mask in packed]
    found: dict[str, Any] = {"ours": [], "obvious": [], **{name: [] for name in FILES}}
    ours(image_hwc, packed)  # warms up
    for _ in range(ROUNDS):
        marks = [time.perf_counter()]
        mine = ours(image_hwc, packed)
        marks.append(time.perf_counter())
        theirs = obvious(image_hwc, full)
        marks.append(time.perf_counter())
        for name in FILES:
            encoded(Picture(mine, None, None), name, QUALITY)  # type: ignore[arg-type]
            marks.append(time.perf_counter())
        for name, seconds in zip(found, np.diff(marks), strict=True):
            found[name].append(seconds * 1000)
    return {**found, "levels": int(cv2.absdiff(mine, theirs).max())}


if __name__ == "__main__":
    print(json.dumps(times()))
