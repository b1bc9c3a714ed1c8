"""The sample photos of the demo as arrays, and prompts with a known answer for them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from models.base import ImageHWC

FOLDER = Path(__file__).parents[2] / "daemon" / "photos"
COFFEE_BOX = (70, 10, 480, 385)
"""Around cup and saucer in coffee.jpg, 600 x 400."""
FACE_POINT = (220, 120)
"""On the face in astronaut.jpg, 512 x 512."""


@cache
def photo(name: str) -> ImageHWC:
    """One of astronaut, chelsea and coffee: RGB uint8 (height, width, 3), not to be written to."""
    with Image.open(FOLDER / f"{name}.jpg") as image:
        pixels_hwc = np.asarray(image.convert("RGB"))
    pixels_hwc.flags.writeable = False
    return pixels_hwc
