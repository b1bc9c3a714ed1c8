"""Regions of like colour and the tree of their merging: what the classical engine knows of an image before any prompt.

Enters: a small RGB image. Leaves: a `Tree` whose nodes are regions, from felzenszwalb's to the whole image.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from models.base import ImageHWC, MaskHW

SIGHT_SIDE = 1024
REGIONS_SIDE = 400

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Links = dict[int, tuple[float, float]]
"""Of one region, per neighbour: sum of colour steps along the common edge, and its length."""


@dataclass(frozen=True, slots=True)
class Tree:
    """A binary partition tree: leaves 0..n-1 are regions, node n + k is the k-th merger, the last one is the whole image.

    `leaf_hw` int32 (height, width) says which leaf a pixel belongs to. Per node: `parents` (-1 for the root), `heights` (how
    unlike the parts were that merged, never falling on the way up), `areas` in pixels, `boxes_xyxy` (n, 4) half-open.
    `order` and `spans` give a node's leaves: `order[spans[node, 0] : spans[node, 1]]`.
    """

    leaf_hw: Ints
    parents: Ints
    heights: Floats
    areas: Ints
    boxes_xyxy: Ints
    order: Ints
    spans: Ints

    @property
    def nbytes(self) -> int:
        """Bytes held by the arrays."""
        arrays = (self.leaf_hw, self.parents, self.heights, self.areas, self.boxes_xyxy, self.order, self.spans)
        return sum(array.nbytes for array in arrays)

    def leaves(self, node: int) -> Ints:
        """The leaves under a node."""
        first, last = self.spans[node]
        return self.order[first:last]

    def path(self, leaf: int) -> list[int]:
        """The nodes from a leaf up to the root, both included."""
        nodes = [leaf]
        while self.parents[nodes[-1]] >= 0:
            nodes.append(int(self.parents[nodes[-1]]))
        return nodes

    def members(self, nodes: list[int]) -> MaskHW:
        """Which leaves lie under any of `nodes`, bool (n leaves,); index it with `leaf_hw` to get a mask."""
        inside = np.zeros(len(self.order), dtype=np.bool_)
        for node in nodes:
            inside[self.leaves(node)] = True
        return inside

    def persistence(self) -> Floats:
        """Per node how clearly it stands out, 0..1: 1 - (unlikeness of its parts) / (unlikeness of it and what it merges with).

        The lifetime of a contour in an ultrametric contour map (Arbeláez 2006), relative to its end. The root has 0.
        """
        ends = np.where(self.parents >= 0, self.heights[self.parents], 0)
        stands = 1 - np.divide(self.heights, ends, out=np.ones_like(self.heights), where=ends > 0)
        return stands.astype(np.float32)


@dataclass(frozen=True, slots=True)
class Sight:
    """What the classical engine keeps of an image of `size_hw`: RGB at a long side of at most 1024 for close-ups, and the
    tree of its regions, found at 400."""

    image_hwc: ImageHWC
    tree: Tree
    size_hw: tuple[int, int]


def look(image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> Sight:
    """Reduce an image, uint8 RGB (height, width, 3), and find its regions; `size_hw` as in `Embedder.shrink`."""
    tree = grow(_reduced(image_hwc, REGIONS_SIDE))
    return Sight(_reduced(image_hwc, SIGHT_SIDE), tree, size_hw or (image_hwc.shape[0], image_hwc.shape[1]))


def grow(image_hwc: ImageHWC, scale: float = 60.0, smallest: int = 30) -> Tree:
    """The tree of an image, uint8 RGB (height, width, 3).

    Leaves by Felzenszwalb and Huttenlocher (IJCV 2004; scikit-image), mergers greedily by likeness of mean Lab colour and
    colour step along the common edge, as in a binary partition tree (Salembier and Garrido 2000).
    """
    import cv2
    from skimage.segmentation import felzenszwalb

    lab_hwc = np.asarray(cv2.cvtColor(image_hwc.astype(np.float32) / 255, cv2.COLOR_RGB2LAB), dtype=np.float32)
    found_hw = felzenszwalb(lab_hwc / 100, scale=scale, sigma=0.7, min_size=smallest, channel_axis=-1)
    leaf_hw = np.unique(found_hw, return_inverse=True)[1].reshape(found_hw.shape).astype(np.int32)
    areas = np.bincount(leaf_hw.ravel())
    totals = [np.bincount(leaf_hw.ravel(), lab_hwc[..., channel].ravel()) for channel in range(3)]
    sums = np.stack(totals, axis=1).astype(np.float64)
    parents, heights = _merge(_links(leaf_hw, lab_hwc), _roughness(leaf_hw, lab_hwc), sums, areas)
    return _tree(leaf_hw, parents, heights)


def _reduced(image_hwc: ImageHWC, side: int) -> ImageHWC:
    """The image at a long side of at most `side`, never enlarged."""
    import cv2

    height, width = image_hwc.shape[:2]
    shrink = side / max(height, width)
    if shrink >= 1:
        return image_hwc.copy()
    size_wh = max(round(width * shrink), 1), max(round(height * shrink), 1)
    return cv2.resize(image_hwc, size_wh, interpolation=cv2.INTER_AREA).astype(np.uint8)


def _roughness(leaf_hw: Ints, lab_hwc: Floats) -> list[float]:
    """Per leaf how unlike itself it is, on the scale of the mergers: mean colour step between its own pixels, by its size."""
    count = int(leaf_hw.max()) + 1
    sums, lengths = np.zeros(count), np.ones(count)
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        within = leaf_hw[a] == leaf_hw[b]
        steps = np.linalg.norm(lab_hwc[a][within] - lab_hwc[b][within], axis=-1)
        sums += np.bincount(leaf_hw[a][within], steps, count)
        lengths += np.bincount(leaf_hw[a][within], minlength=count)
    heights: list[float] = (3 * sums / lengths * np.bincount(leaf_hw.ravel()) ** 0.3).tolist()
    return heights


def _links(leaf_hw: Ints, lab_hwc: Floats) -> list[Links]:
    """Per region its neighbours, with the colour steps along the common edge."""
    count = int(leaf_hw.max()) + 1
    codes, steps = [], []
    for a, b in ((np.s_[:, :-1], np.s_[:, 1:]), (np.s_[:-1], np.s_[1:])):
        apart = leaf_hw[a] != leaf_hw[b]
        pairs = np.sort(np.stack([leaf_hw[a][apart], leaf_hw[b][apart]]), axis=0).astype(np.int64)
        codes.append(pairs[0] * count + pairs[1])
        steps.append(np.linalg.norm(lab_hwc[a][apart] - lab_hwc[b][apart], axis=-1))
    unique, inverse = np.unique(np.concatenate(codes), return_inverse=True)
    sums, lengths = np.bincount(inverse, np.concatenate(steps)), np.bincount(inverse)
    links: list[Links] = [{} for _ in range(count)]
    for code, total, length in zip(unique.tolist(), sums.tolist(), lengths.tolist(), strict=True):
        one, other = divmod(code, count)
        links[one][other] = links[other][one] = (total, length)
    return links


def _merge(
    links: list[Links], roughness: list[float], sums: npt.NDArray[np.float64], areas: npt.NDArray[np.intp]
) -> tuple[list[int], list[float]]:
    """Merge the two most alike neighbours until one region is left; per node its parent and height."""
    colours = [tuple(row) for row in (sums / areas[:, None]).tolist()]
    sizes: list[float] = [float(area) for area in areas]
    parents, heights = [-1] * len(links), list(roughness)

    def unlikeness(a: int, b: int) -> float:
        total, length = links[a][b]
        apart = sum((p - q) ** 2 for p, q in zip(colours[a], colours[b], strict=True)) ** 0.5
        return float((apart + 2 * total / length) * min(sizes[a], sizes[b]) ** 0.3)

    queue = [(unlikeness(a, b), a, b) for a in range(len(links)) for b in links[a] if a < b]
    heapq.heapify(queue)
    while queue:
        height, a, b = heapq.heappop(queue)
        if parents[a] >= 0 or parents[b] >= 0:
            continue
        node, size = len(parents), sizes[a] + sizes[b]
        parents[a] = parents[b] = node
        parents.append(-1)
        heights.append(max(height, heights[a], heights[b]))
        sizes.append(size)
        colours.append(tuple((p * sizes[a] + q * sizes[b]) / size for p, q in zip(colours[a], colours[b], strict=True)))
        links.append(_joined(links, a, b, node))
        for other in links[node]:
            heapq.heappush(queue, (unlikeness(other, node), other, node))
    return parents, heights


def _joined(links: list[Links], a: int, b: int, node: int) -> Links:
    """The neighbours of `a` and `b` together, told of their new neighbour `node`."""
    joined: Links = {}
    for old in (a, b):
        for other, (total, length) in links[old].items():
            if other not in (a, b):
                before = joined.get(other, (0.0, 0.0))
                joined[other] = (before[0] + total, before[1] + length)
                links[other].pop(old)
        links[old] = {}
    for other, link in joined.items():
        links[other][node] = link
    return joined


def _tree(leaf_hw: Ints, parents: list[int], heights: list[float]) -> Tree:
    """Areas, boxes and leaves of every node, children before parents."""
    count = int(leaf_hw.max()) + 1
    children: list[list[int]] = [[] for _ in parents]
    for node, parent in enumerate(parents):
        if parent >= 0:
            children[parent].append(node)
    order: list[int] = []
    spans = np.zeros((len(parents), 2), dtype=np.int32)
    stack = [(len(parents) - 1, False)]
    while stack:
        node, left = stack.pop()
        if left:
            spans[node, 1] = len(order)
            continue
        spans[node, 0] = len(order)
        order += [node] if node < count else []
        stack += [(node, True), *((child, False) for child in reversed(children[node]))]
    areas, boxes_xyxy = _extents(leaf_hw, len(parents))
    for node in range(count, len(parents)):
        one, other = children[node]
        areas[node] = areas[one] + areas[other]
        boxes_xyxy[node, :2] = np.minimum(boxes_xyxy[one, :2], boxes_xyxy[other, :2])
        boxes_xyxy[node, 2:] = np.maximum(boxes_xyxy[one, 2:], boxes_xyxy[other, 2:])
    return Tree(
        leaf_hw,
        np.array(parents, dtype=np.int32),
        np.array(heights, dtype=np.float32),
        areas,
        boxes_xyxy,
        np.array(order, dtype=np.int32),
        spans,
    )


def _extents(leaf_hw: Ints, nodes: int) -> tuple[Ints, Ints]:
    """Areas and boxes of the leaves, in arrays with room for every node."""
    areas, boxes_xyxy = np.zeros(nodes, dtype=np.int32), np.zeros((nodes, 4), dtype=np.int32)
    counts = np.bincount(leaf_hw.ravel())
    areas[: len(counts)] = counts
    ys, xs = np.indices(leaf_hw.shape)
    boxes_xyxy[: len(counts), :2] = np.iinfo(np.int32).max
    np.minimum.at(boxes_xyxy[:, 0], leaf_hw.ravel(), xs.ravel())
    np.minimum.at(boxes_xyxy[:, 1], leaf_hw.ravel(), ys.ravel())
    np.maximum.at(boxes_xyxy[:, 2], leaf_hw.ravel(), xs.ravel() + 1)
    np.maximum.at(boxes_xyxy[:, 3], leaf_hw.ravel(), ys.ravel() + 1)
    return areas, boxes_xyxy
