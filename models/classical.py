"""The classical engine: no weights, no GPU. Regions by felzenszwalb and a merger tree, objects by GrabCut.

Enters: an image, once; then prompts in its pixels. Leaves: masks at full resolution, computed small and enlarged inside
their box.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from models.base import Embedding, EverythingOptions, ImageHWC, Later, Mask, Stop, VisualQuestion, pack
from models.masks import enlarge, nms

if TYPE_CHECKING:
    from models.regions import Sight

PERSISTENCE_MIN = 0.2
AREA_MAX = 0.9
REGIONS_MAX = 1000
"""Regions smaller than this fraction of the image are texture."""


@dataclass(frozen=True, slots=True)
class Classical:
    """VisualSegmenter and EverythingSegmenter on any CPU; near a network on clear objects in a box, fair with points.

    It knows no probabilities: `predicted_iou` and `stability_score` stay None and their thresholds are not applied.
    `score` is, for objects, how clearly the mask's edge stands out (`closeup.contrast`), and in everything mode how long
    a region survives in the merger tree (`Tree.persistence`); both 0..1 and comparable only with each other's kind.
    """

    engine: str = "classical"
    model_id: str = "grabcut+felzenszwalb"
    device: str = "cpu"

    def shrink(self, image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> Sight:
        """The image reduced, and its regions; uint8 RGB (height, width, 3)."""
        from models import regions

        return regions.look(image_hwc, size_hw)

    def embed(self, smalls: Sequence[Sight]) -> list[Embedding]:
        """Nothing is left to do: there is no device."""
        return [Embedding(sight.size_hw, sight, sight.image_hwc.nbytes + sight.tree.nbytes) for sight in smalls]

    def segment(self, questions: Sequence[VisualQuestion], stop: Stop) -> list[Later]:
        """Per question one mask, or three when `multimask`, best first; None lets a lone point try three and keep the best.

        A foreground point is always inside and a background point never, unless both name the same pixel.
        """
        answers = []
        for question in questions:
            stop()
            answers.append(_kept(_candidates(question)))
        return answers

    def everything(self, embedding: Embedding, options: EverythingOptions, stop: Stop) -> Later:
        """The regions that outlive their surroundings in the merger tree, largest first, at most points_per_side squared."""
        sight: Sight = embedding.data
        masks = []
        for node, score in _standing_out(sight, options):
            stop()
            mask = replace(_node_mask(sight, node), score=score)
            if mask.area >= max(options.min_mask_area, 1):
                masks.append(mask)
        return _kept(sorted(masks, key=lambda mask: -mask.area))


def _kept(masks: list[Mask]) -> Later:
    return lambda: masks


def _candidates(question: VisualQuestion) -> list[Mask]:
    from models import pointing

    found = pointing.candidates(question.embedding.data, question.prompt)
    return found if question.multimask else found[:1]


def _standing_out(sight: Sight, options: EverythingOptions) -> list[tuple[int, float]]:
    """Nodes of the tree worth returning, with their persistence: clear, not specks, not nearly the whole image, no two in
    one box."""
    tree = sight.tree
    scores, pixels = tree.persistence(), tree.leaf_hw.size
    full = sight.size_hw[0] * sight.size_hw[1] / pixels
    area_min = max(pixels / REGIONS_MAX, options.min_mask_area / full * 0.8)
    worth = (tree.areas >= area_min) & (tree.areas <= AREA_MAX * pixels) & (scores >= PERSISTENCE_MIN)
    nodes = np.flatnonzero(worth)
    # A score of the tree alone would fill the answer with bits of texture: size counts too.
    ranks = scores[nodes] * tree.areas[nodes] ** 0.3
    kept = nms(tree.boxes_xyxy[nodes], ranks, options.box_nms_thresh)[: options.points_per_side**2]
    return [(int(nodes[index]), float(scores[nodes[index]])) for index in kept]


def _node_mask(sight: Sight, node: int) -> Mask:
    tree = sight.tree
    x0, y0, x1, y1 = tree.boxes_xyxy[node].tolist()
    height, width = tree.leaf_hw.shape
    x0, y0, x1, y1 = max(x0 - 3, 0), max(y0 - 3, 0), min(x1 + 3, width), min(y1 + 3, height)
    mask_hw = tree.members([node])[tree.leaf_hw[y0:y1, x0:x1]]
    pixel_w, pixel_h = sight.size_hw[1] / width, sight.size_hw[0] / height
    crop_hw, offset_xy = enlarge(mask_hw, (x0 * pixel_w, y0 * pixel_h), (pixel_w, pixel_h), sight.size_hw)
    return pack(crop_hw, offset_xy)
