"""Everything mode: what follows the network, against the post-processing of transformers' mask-generation pipeline, one thread.

Both sides get the same made-up answers of a SAM decoder to a grid of clicks, and end with masks of the image's size. Neither
runs a network.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
import time
from types import ModuleType
from typing import Any

import numpy as np
from bench.blobs import blob, rough
from bench.child import answer, lacks
from bench.ground import Ground
from bench.report import Report, ratios

from handlers._rle import segmentation
from models.amg import everything, grid
from models.base import EverythingOptions, Mask
from models.framing import Floats, fitted

SIZE_HW = (600, 800)
SIDE, LOW_SIDE = 1024, 256
FRAME = fitted(SIZE_HW, SIDE, LOW_SIDE)
OPTIONS = EverythingOptions()
OBJECTS = 80
LEVELS = ((-0.4, 0.82), (0.0, 0.93), (0.5, 0.86))
"""What a click's three answers are, part, whole and more: by how much of its radius an object's edge is moved, and their usual
predicted IoU."""
SHARPNESS = ((6, 16), (6, 16), (0.3, 1))
"""By how much logits change per cell: two answers of three are sharp, one is blurred and fails by its stability."""
BATCH = 16  # clicks; with the pipeline's usual 64 the library takes half as long again
ROUNDS = 3
SAME_IOU = 0.95
THEIRS = "transformers.models.sam.image_processing_pil_sam"
NEEDED = ("torch", "transformers", "pycocotools")


def run(_: Ground, report: Report) -> None:
    """One round of the library, since it takes so long, between rounds of ours."""
    clicks = OPTIONS.points_per_side**2
    sentence = (
        f"{clicks} clicks x {len(LEVELS)} answers of {LOW_SIDE}x{LOW_SIDE} to masks of {SIZE_HW[1]}x{SIZE_HW[0]}, one thread"
    )
    report.title("everything", sentence)
    if lacks(report, NEEDED):
        return
    found = answer("bench.everything")
    report.note(f"of {clicks * len(LEVELS)} answers ours keeps {found['kept']} masks, the library {found['their kept']}")
    report.side("ours", found["ours"], "ms")
    report.side("transformers' filter, NMS and masks", found["theirs"], "ms")
    report.at_least("transformers / ours", ratios(found["theirs"] * len(found["ours"]), found["ours"]), 20)
    report.at_least("share of its masks that ours has", [found["matched"]], 0.95)
    report.side("share of our masks that it has", [found["matched back"]], "")


def answers() -> tuple[Floats, Floats]:
    """What a decoder says to every click of the grid, row by row: logits (n, 3, low, low) and predicted IoU (n, 3).

    A click finds the smallest object that it lies in, or else the nearest. Clicks on one object agree but for a little; some
    answers are sharp, some are not.
    """
    random = np.random.default_rng(11)
    radii = np.geomspace(4, 50, OBJECTS)
    rows, columns = FRAME.cells_hw
    centres = random.uniform((0, 0), (columns, rows), (OBJECTS, 2))
    depths = np.stack([blob(random, LOW_SIDE, radius, tuple(centre)) for radius, centre in zip(radii, centres, strict=True)])
    shapes = np.stack([rough(random, LOW_SIDE) for _ in range(16)])
    cells = (FRAME.points(grid(OPTIONS.points_per_side, SIZE_HW)) * LOW_SIDE / SIDE).astype(int)
    logits = np.empty((len(cells), len(LEVELS), LOW_SIDE, LOW_SIDE), dtype=np.float32)
    ious = np.empty(logits.shape[:2], dtype=np.float32)
    for click, (x, y) in enumerate(cells):
        within = np.flatnonzero(depths[:, y, x] > 0)
        found = int(within[0]) if within.size else int(depths[:, y, x].argmax())
        for level, (moved, usual) in enumerate(LEVELS):
            unevenness = random.uniform(0, 0.5) * shapes[random.integers(len(shapes))]
            sharpness = random.uniform(*SHARPNESS[int(random.integers(len(SHARPNESS)))])
            logits[click, level] = (depths[found] + moved * radii[found] + unevenness) * np.float32(sharpness)
            ious[click, level] = 1 - abs(1 - usual - random.normal(0, 0.05))
    return logits, ious


def masks_of(logits: Floats, ious: Floats) -> list[Mask]:
    """Ours: the clicks are answered already."""
    batches = iter(range(0, len(logits), BATCH))

    def clicks(points_xy: Any) -> tuple[Floats, Floats]:
        first = next(batches)
        return logits[first : first + len(points_xy)], ious[first : first + len(points_xy)]

    return everything(clicks, FRAME, OPTIONS, BATCH, lambda: None)()


def their_runs(logits: Floats, ious: Floats) -> list[dict[str, Any]]:
    """The library's, as its pipeline calls it: run lengths of the masks that it made."""
    import torch

    library = importlib.import_module(THEIRS)
    processor, box = library.SamImageProcessorPil(), [0, 0, SIZE_HW[1], SIZE_HW[0]]
    scores: list[Any] = []
    runs: list[Any] = []
    boxes: list[Any] = []
    for first in range(0, len(logits), BATCH):
        batch, batch_ious = (torch.from_numpy(values[first : first + BATCH])[None] for values in (logits, ious))
        full = processor.post_process_masks(batch, [SIZE_HW], [FRAME.inner_hw], binarize=False)
        iou_min, stability_min = OPTIONS.pred_iou_thresh, OPTIONS.stability_score_thresh
        found = processor.filter_masks(full[0], batch_ious[0], SIZE_HW, box, iou_min, stability_min)
        runs.extend(found[0])
        scores.append(found[1])
        boxes.append(found[2])
    iou_max = OPTIONS.box_nms_thresh
    # What the processor's method of that name calls, once it has seen that torchvision is installed.
    _, _, kept, _ = library._post_process_for_mask_generation(runs, torch.cat(scores), torch.cat(boxes), iou_max)
    return list(kept)


def add_torchvision() -> None:
    """Stands in for the one function of torchvision that the library calls here, where torchvision is not installed."""
    if importlib.util.find_spec("torchvision") is not None:
        return
    importlib.import_module(THEIRS)  # which looks for torchvision, and must find none
    for name in ("torchvision", "torchvision.ops", "torchvision.ops.boxes"):
        sys.modules[name] = ModuleType(name)
    sys.modules["torchvision.ops.boxes"].batched_nms = batched_nms  # type: ignore[attr-defined]


def batched_nms(boxes: Any, scores: Any, idxs: Any, iou_threshold: float) -> Any:
    """Of boxes (n, 4) the indexes that are left, best score first. All of them are of one class here (`idxs`)."""
    import torch

    assert not idxs.any()
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(dim=1)
    common = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:]) - torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    common = common.clamp(min=0).prod(dim=2)
    near = (common / (areas[:, None] + areas[None] - common) > iou_threshold).numpy()
    gone, kept = np.zeros(len(boxes), dtype=np.bool_), []
    for index in scores.argsort(descending=True).tolist():
        if not gone[index]:
            kept.append(index)
            gone |= near[index]
    return torch.tensor(kept)


def measure() -> dict[str, Any]:
    """Milliseconds of both sides and how well they agree."""
    add_torchvision()
    logits, ious = answers()
    their_runs(logits[:1], np.ones_like(ious[:1]))  # loads and warms up
    took: list[float] = []
    theirs: list[dict[str, Any]] = []
    masks = masks_of(logits, ious)
    ours = []
    for number in range(ROUNDS):
        began = time.perf_counter()
        masks = masks_of(logits, ious)
        ours.append((time.perf_counter() - began) * 1000)
        if number == ROUNDS // 2:
            began = time.perf_counter()
            theirs = their_runs(logits, ious)
            took.append((time.perf_counter() - began) * 1000)
    return {"ours": ours, "theirs": took, "kept": len(masks), "their kept": len(theirs), **matches(masks, theirs)}


def matches(masks: list[Mask], theirs: list[dict[str, Any]]) -> dict[str, float]:
    """The share of the library's masks that one of ours is like, and the other way round."""
    from pycocotools import mask as coco_mask

    mine = [segmentation(mask, (SIZE_HW[1], SIZE_HW[0])) for mask in masks]
    others = [coco_mask.frPyObjects(runs, *SIZE_HW) for runs in theirs]
    alike = coco_mask.iou(mine, others, [0] * len(others)) >= SAME_IOU
    return {"matched": float(alike.any(axis=0).mean()), "matched back": float(alike.any(axis=1).mean())}


if __name__ == "__main__":
    print(json.dumps(measure()))
