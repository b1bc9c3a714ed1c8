"""Small removals without a network: colours grow into the hole from its edge.

Enters: holes. Leaves: patches, computed on reduced crops where those are large. Any CPU, no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from models.base import Hole, Patch, Stop
from models.crops import crops, cut, patch

RADIUS = 5
SIDE_MAX = 1024


@dataclass(frozen=True, slots=True)
class Telea:
    """Inpainter by Telea's fast marching method ("An image inpainting technique based on the fast marching method", 2004); fair
    for scratches, wires and small things on plain ground, a blur for anything large. Crops longer than `side_max` are reduced."""

    side_max: int = SIDE_MAX
    engine: str = "classical"
    model_id: str = "telea"
    device: str = "cpu"

    def inpaint(self, holes: Sequence[Hole], stop: Stop) -> list[list[Patch]]:
        """Per hole the patches that cover its mask; a crop that is missing as a whole stays as it is."""
        return [[self._patch(hole, box, stop) for box in crops(hole.mask, _size_hw(hole))] for hole in holes]

    def _patch(self, hole: Hole, box_xyxy: tuple[int, int, int, int], stop: Stop) -> Patch:
        stop()
        own = cut(hole, box_xyxy, self.side_max)
        painted_hwc = cv2.inpaint(own.pixels_hwc, own.missing_hw, RADIUS, cv2.INPAINT_TELEA)
        return patch(box_xyxy, painted_hwc.astype(np.uint8, copy=False))


def _size_hw(hole: Hole) -> tuple[int, int]:
    return hole.image_hwc.shape[0], hole.image_hwc.shape[1]
