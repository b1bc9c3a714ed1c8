"""One prompt to candidate masks, the classical way: a start from regions or a box, refined by GrabCut.

Enters: a `Sight` and a `Prompt`. Leaves: three masks at full resolution, best first, that obey every point.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum, auto

import cv2
import numpy as np

from models.base import Mask, MaskHW, Prompt, pack
from models.closeup import BytesHW, Closeup, contrast, cut, tidied
from models.masks import box_ious, enlarge, mask_iou, surround
from models.regions import Ints, Sight, Tree

CLOSEUP_SIDE = 320
MARGIN = 0.25
GROUP_AREA_MAX = 0.5
CANDIDATES = 3
CORE = 0.5
REACH = 0.3
KEPT_MIN = 0.2

Box = tuple[float, float, float, float]
PointsXY = list[tuple[float, float]]


class Way(Enum):
    """What GrabCut first takes for the object."""

    NODES = auto()
    """The regions named by `Start.nodes`."""
    WITHIN = auto()
    """The regions that lie mostly in the box."""
    BOX = auto()
    """All of the box."""
    OVAL = auto()
    """The oval in the box, its core for sure; without a box the oval around the points."""
    MASK = auto()
    """The mask of the prompt."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where one candidate comes from; nothing outside `extent`, a box in the image, belongs to the object."""

    way: Way
    extent: Box
    nodes: tuple[int, ...] = ()


def candidates(sight: Sight, prompt: Prompt) -> list[Mask]:
    """Three masks, best first (they may coincide).

    `score` is how clearly the edge stands out (`closeup.contrast`), times how well the mask fits what was given: its IoU with a
    mask, how well it fills a box, else the share of the image's rim that it leaves free: what runs along it is rarely meant.
    """
    masks = [_candidate(sight, prompt, start) for start in _starts(sight, prompt)]
    return sorted(masks, key=lambda mask: -mask.score)[:CANDIDATES]


def _starts(sight: Sight, prompt: Prompt) -> list[Start]:
    wanted = _points(prompt, 1)
    if prompt.mask is not None:
        extent = prompt.box_xyxy or _widened(prompt.mask.box_xyxy, 0.1)
        node = _best_fit(sight, prompt.mask.box_xyxy)
        starts = [Start(Way.MASK, extent), Start(Way.NODES, extent, (node,)), Start(Way.WITHIN, extent)]
    elif prompt.box_xyxy is not None:
        starts = [Start(way, prompt.box_xyxy) for way in (Way.WITHIN, Way.BOX, Way.OVAL)]
    else:
        groups = _groups(sight, wanted, _points(prompt, 0))
        starts = [Start(Way.NODES, _extent_of(sight, nodes), nodes) for nodes in groups]
        starts.append(Start(Way.OVAL, _around(sight, wanted)))
    return [Start(start.way, _within(sight, start.extent, wanted), start.nodes) for start in starts]


def _candidate(sight: Sight, prompt: Prompt, start: Start) -> Mask:
    wanted, unwanted = _points(prompt, 1), _points(prompt, 0)
    closeup = _closeup(sight, start.extent)
    sketch_hw = _sketch(sight, prompt, start, closeup)
    mask_hw = tidied(_refined(closeup, sketch_hw), [closeup.at(point) for point in wanted])
    crop_hw, offset_xy = enlarge(mask_hw, closeup.origin_xy, closeup.pixel_wh, sight.size_hw)
    mask = pack(crop_hw, offset_xy, score=contrast(closeup.image_hwc, mask_hw))
    mask = _with_points(mask, wanted, unwanted)
    return replace(mask, score=mask.score * _plausible(sight, prompt, mask))


def _plausible(sight: Sight, prompt: Prompt, mask: Mask) -> float:
    """0..1, by where the mask lies alone."""
    if prompt.mask is not None:
        return mask_iou(mask, prompt.mask)
    if prompt.box_xyxy is not None:
        x0, y0, x1, y1 = prompt.box_xyxy
        filled = min(mask.area / ((x1 - x0) * (y1 - y0)), 1.0)
        return float(box_ious(np.array(prompt.box_xyxy), np.array([mask.box_xyxy], dtype=np.float64))[0] * filled**0.2)
    height, width = sight.size_hw
    sides = ((0, 0, width, 1), (0, height - 1, width, height), (0, 0, 1, height), (width - 1, 0, width, height))
    covered = sum(int(mask.window_hw(side).sum()) for side in sides)
    return 1 - covered / (2 * (width + height))


def _points(prompt: Prompt, label: int) -> PointsXY:
    return [point for point, own in zip(prompt.points_xy, prompt.labels, strict=True) if own == label]


def _leaf_at(sight: Sight, point_xy: tuple[float, float]) -> int:
    height, width = sight.tree.leaf_hw.shape
    row = min(int(point_xy[1] * height / sight.size_hw[0]), height - 1)
    column = min(int(point_xy[0] * width / sight.size_hw[1]), width - 1)
    return int(sight.tree.leaf_hw[row, column])


def _groups(sight: Sight, wanted: PointsXY, unwanted: PointsXY) -> list[tuple[int, ...]]:
    """Three sets of regions that the points may mean: single nodes that hold all wanted points and no unwanted one, else one
    per point."""
    tree = sight.tree
    barred = {node for point in unwanted for node in tree.path(_leaf_at(sight, point))}
    paths = [tree.path(_leaf_at(sight, point)) for point in wanted]
    common = [node for node in paths[0] if all(node in path for path in paths[1:])]
    groups: list[tuple[int, ...]] = [(node,) for node in _clearest(tree, common, barred)]
    if len(groups) < CANDIDATES:
        apart = [_clearest(tree, path, barred) or path[:1] for path in paths]
        groups += [tuple(nodes[min(rank, len(nodes) - 1)] for nodes in apart) for rank in range(CANDIDATES)]
    return groups[:CANDIDATES]


def _clearest(tree: Tree, nodes: list[int], barred: set[int]) -> list[int]:
    """At most three nodes of a path that stand out most for their size, each at least double or half the others."""
    allowed = [node for node in nodes if node not in barred and tree.areas[node] <= GROUP_AREA_MAX * tree.leaf_hw.size]
    ranks = tree.persistence() * tree.areas**0.1
    chosen: list[int] = []
    for node in sorted(allowed, key=lambda node: -ranks[node]):
        if len(chosen) < CANDIDATES and all(not 0.5 < tree.areas[node] / tree.areas[other] < 2 for other in chosen):
            chosen.append(node)
    return chosen


def _best_fit(sight: Sight, box_xyxy: tuple[int, int, int, int]) -> int:
    """The node whose box is most like that box of the image."""
    height, width = sight.tree.leaf_hw.shape
    scale = np.array([sight.size_hw[1] / width, sight.size_hw[0] / height] * 2)
    return int(np.argmax(box_ious(np.array(box_xyxy, dtype=np.float64), sight.tree.boxes_xyxy * scale)))


def _extent_of(sight: Sight, nodes: tuple[int, ...]) -> Box:
    boxes = np.array([_widened(_node_box(sight, node), 0.2) for node in nodes])
    low, high = boxes[:, :2].min(axis=0).tolist(), boxes[:, 2:].max(axis=0).tolist()
    return low[0], low[1], high[0], high[1]


def _around(sight: Sight, wanted: PointsXY) -> Box:
    """A box of about a third of the image around the points."""
    reach = REACH * min(sight.size_hw)
    xs, ys = [point[0] for point in wanted], [point[1] for point in wanted]
    return min(xs) - reach, min(ys) - reach, max(xs) + reach, max(ys) + reach


def _within(sight: Sight, extent: Box, wanted: PointsXY) -> Box:
    """The extent with the wanted points in it, clipped to the image, at least a pixel."""
    xs, ys = [point[0] for point in wanted], [point[1] for point in wanted]
    height, width = sight.size_hw
    x0, y0 = min(max(min(extent[0], *xs, width), 0), width - 1), min(max(min(extent[1], *ys, height), 0), height - 1)
    x1 = min(max(extent[2], x0 + 1, *(x + 1 for x in xs)), width)
    y1 = min(max(extent[3], y0 + 1, *(y + 1 for y in ys)), height)
    return float(x0), float(y0), float(x1), float(y1)


def _node_box(sight: Sight, node: int) -> Box:
    height, width = sight.tree.leaf_hw.shape
    scale = np.array([sight.size_hw[1] / width, sight.size_hw[0] / height] * 2)
    x0, y0, x1, y1 = (sight.tree.boxes_xyxy[node] * scale).tolist()
    return x0, y0, x1, y1


def _widened(box_xyxy: Box | tuple[int, int, int, int], share: float) -> Box:
    x0, y0, x1, y1 = box_xyxy
    margin = share * max(x1 - x0, y1 - y0) + 4
    return x0 - margin, y0 - margin, x1 + margin, y1 + margin


def _closeup(sight: Sight, extent: Box) -> Closeup:
    """The image around the extent with some background, at a long side of at most 320, never enlarged."""
    small_h, small_w = sight.image_hwc.shape[:2]
    pixel_w, pixel_h = sight.size_hw[1] / small_w, sight.size_hw[0] / small_h
    wide = _widened(extent, MARGIN)
    x0, y0 = max(int(wide[0] / pixel_w), 0), max(int(wide[1] / pixel_h), 0)
    x1, y1 = min(int(np.ceil(wide[2] / pixel_w)), small_w), min(int(np.ceil(wide[3] / pixel_h)), small_h)
    crop_hwc = sight.image_hwc[y0:y1, x0:x1]
    shrink = min(CLOSEUP_SIDE / max(crop_hwc.shape[:2]), 1.0)
    size_wh = max(round((x1 - x0) * shrink), 1), max(round((y1 - y0) * shrink), 1)
    image_hwc = cv2.resize(crop_hwc, size_wh, interpolation=cv2.INTER_AREA).astype(np.uint8)
    pixel_wh = (x1 - x0) * pixel_w / size_wh[0], (y1 - y0) * pixel_h / size_wh[1]
    return Closeup(image_hwc, (x0 * pixel_w, y0 * pixel_h), pixel_wh)


def _leaves(sight: Sight, closeup: Closeup) -> Ints:
    """The leaf under every pixel of the close-up."""
    tree_h, tree_w = sight.tree.leaf_hw.shape
    height, width = closeup.size_hw
    xs = (closeup.origin_xy[0] + (np.arange(width) + 0.5) * closeup.pixel_wh[0]) * tree_w / sight.size_hw[1]
    ys = (closeup.origin_xy[1] + (np.arange(height) + 0.5) * closeup.pixel_wh[1]) * tree_h / sight.size_hw[0]
    return sight.tree.leaf_hw[np.ix_(np.clip(ys.astype(int), 0, tree_h - 1), np.clip(xs.astype(int), 0, tree_w - 1))]


def _sketch(sight: Sight, prompt: Prompt, start: Start, closeup: Closeup) -> BytesHW:
    """Where GrabCut starts from: nothing outside the extent, the points as they say."""
    x0, y0, x1, y1 = closeup.box(start.extent)
    inside_hw = np.zeros(closeup.size_hw, dtype=np.bool_)
    inside_hw[y0:y1, x0:x1] = True
    start_hw = _first_guess(sight, prompt, start, closeup, inside_hw) & inside_hw
    sketch_hw = np.where(start_hw, cv2.GC_PR_FGD, np.where(inside_hw, cv2.GC_PR_BGD, cv2.GC_BGD)).astype(np.uint8)
    if start.way is Way.OVAL and prompt.box_xyxy is not None:
        sketch_hw[_oval(closeup, start.extent, CORE)] = cv2.GC_FGD
    for label, sure in ((0, cv2.GC_BGD), (1, cv2.GC_FGD)):
        for point in _points(prompt, label):
            cv2.circle(sketch_hw, closeup.at(point), 2, sure, -1)
    for point in _points(prompt, 0):
        column, row = closeup.at(point)
        sketch_hw[row, column] = cv2.GC_BGD
    return sketch_hw


def _first_guess(sight: Sight, prompt: Prompt, start: Start, closeup: Closeup, inside_hw: MaskHW) -> MaskHW:
    match start.way:
        case Way.NODES:
            return sight.tree.members(list(start.nodes))[_leaves(sight, closeup)]
        case Way.WITHIN:
            return _mostly_within(sight.tree, _leaves(sight, closeup), inside_hw)
        case Way.BOX:
            return inside_hw
        case Way.OVAL:
            return _oval(closeup, start.extent, 1.0)
        case Way.MASK:
            assert prompt.mask is not None
            return _seen(prompt.mask, closeup)


def _oval(closeup: Closeup, extent: Box, size: float) -> MaskHW:
    """The oval in the middle of the extent, `size` times as long and wide."""
    x0, y0, x1, y1 = closeup.box(extent)
    ys, xs = np.ogrid[: closeup.size_hw[0], : closeup.size_hw[1]]
    from_middle = ((2 * xs + 1 - x0 - x1) / (x1 - x0)) ** 2 + ((2 * ys + 1 - y0 - y1) / (y1 - y0)) ** 2
    return np.asarray(from_middle <= size**2)


def _seen(mask: Mask, closeup: Closeup) -> MaskHW:
    """A mask of the image in pixels of the close-up."""
    x0, y0 = round(closeup.origin_xy[0]), round(closeup.origin_xy[1])
    height, width = closeup.size_hw
    x1, y1 = x0 + round(width * closeup.pixel_wh[0]), y0 + round(height * closeup.pixel_wh[1])
    full_hw = mask.window_hw((x0, y0, max(x1, x0 + 1), max(y1, y0 + 1))).view(np.uint8) * 255
    return cv2.resize(full_hw, (width, height), interpolation=cv2.INTER_AREA) > 127


def _mostly_within(tree: Tree, leaf_hw: Ints, inside_hw: MaskHW) -> MaskHW:
    """Pixels of regions that lie mostly inside: what runs on beyond the box is likely background. All of them when little is
    left."""
    count = len(tree.order)
    within = np.bincount(leaf_hw[inside_hw], minlength=count) / np.maximum(np.bincount(leaf_hw.ravel(), minlength=count), 1)
    mostly_hw: MaskHW = (within > 0.7)[leaf_hw] & inside_hw
    return mostly_hw if mostly_hw.sum() >= 0.2 * inside_hw.sum() else inside_hw


def _refined(closeup: Closeup, sketch_hw: BytesHW) -> MaskHW:
    """GrabCut's answer; the start itself where GrabCut gave most of it up, as it does in texture."""
    start_hw = (sketch_hw & 1).astype(np.bool_)
    cut_hw = _obeyed(cut(closeup.image_hwc, sketch_hw), sketch_hw)
    return cut_hw if cut_hw.sum() >= KEPT_MIN * start_hw.sum() else start_hw


def _obeyed(mask_hw: MaskHW, sketch_hw: BytesHW) -> MaskHW:
    """The mask where the sketch leaves it open."""
    obeyed_hw: MaskHW = (mask_hw & (sketch_hw != cv2.GC_BGD)) | (sketch_hw == cv2.GC_FGD)
    return obeyed_hw


def _with_points(mask: Mask, wanted: PointsXY, unwanted: PointsXY) -> Mask:
    """The mask with the very pixels of the points as they say."""
    for points, value in ((wanted, True), (unwanted, False)):
        for point in points:
            x, y = int(point[0]), int(point[1])
            if bool(mask.window_hw((x, y, x + 1, y + 1))[0, 0]) != value:
                mask = _with_pixel(mask, x, y, value)
    return mask


def _with_pixel(mask: Mask, x: int, y: int, value: bool) -> Mask:
    here = (x, y, x + 1, y + 1)
    box_xyxy = surround(mask.box_xyxy, here) if mask.area else here
    crop_hw = mask.window_hw(box_xyxy)
    crop_hw[y - box_xyxy[1], x - box_xyxy[0]] = value
    return pack(crop_hw, box_xyxy[:2], score=mask.score)
