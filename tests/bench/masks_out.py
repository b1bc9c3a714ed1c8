"""Masks out: from 100 low-resolution answers to the label PNG and the COCO dataset of an image of 12 megapixels, one thread.

The obvious way enlarges every answer to a full-size mask, paints a label map for Pillow and encodes full masks with
pycocotools. Each side runs in processes of its own; memory is what a process grew by at its highest.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import time
from typing import Any

import numpy as np
import numpy.typing as npt
from bench.blobs import blob
from bench.child import answer, held_bytes, lacks
from bench.ground import Ground
from bench.report import Report, ratios
from PIL import Image

from handlers._coco import dataset
from handlers._instances import Instance, colours
from handlers._png import mask_png
from models.base import Mask
from models.framing import Floats, Frame, mask_of

MASKS, LOW_SIDE = 100, 288
SIZE_WH = (4000, 3000)
FRAME = Frame((SIZE_WH[1], SIZE_WH[0]), (1008, 1008), 1008, LOW_SIDE)
SHARES = (0.001, 0.15)
"""The smallest and the largest mask, of the image."""
ROUNDS = 3
NEEDED = ("torch", "pycocotools")
MB = 1024 * 1024
LABEL = "thing"


def run(_: Ground, report: Report) -> None:
    """Times in one process, neighbours in time; the memory of each side in a fresh one."""
    report.title("masks_out", f"{MASKS} masks of 0.1 to 15 % of an image of 12 megapixels to label PNG and COCO JSON, one thread")
    if lacks(report, NEEDED):
        return
    found = answer("bench.masks_out", "times")
    masks, files, theirs_masks, theirs_files = (found[name] for name in ("masks", "files", "obvious masks", "obvious files"))
    both = [first + second for first, second in zip(masks, files, strict=True)]
    theirs_both = [first + second for first, second in zip(theirs_masks, theirs_files, strict=True)]
    report.side("from logits, ours (with polygons)", both, "ms")
    report.side("from logits, obvious (without polygons)", theirs_both, "ms")
    report.side("from ready masks, ours (packed in their box)", files, "ms")
    report.side("from ready masks, obvious (full-size bool)", theirs_files, "ms")
    report.at_least("from logits: obvious / ours", ratios(theirs_both, both), 10)
    report.at_least("from ready masks: obvious / ours", ratios(theirs_files, files), 10)
    report.at_least("least IoU of a mask with the obvious one", [found["iou"]], 0.99)
    report.side("memory that the obvious way takes", [answer("bench.masks_out", "peak", "obvious") / MB], "MiB")
    report.at_most("memory that ours takes, MiB", [answer("bench.masks_out", "peak", "ours") / MB], 400)


def answers() -> Floats:
    """What a model says: (MASKS, LOW_SIDE, LOW_SIDE)."""
    random = np.random.default_rng(7)
    logits = np.empty((MASKS, LOW_SIDE, LOW_SIDE), dtype=np.float32)
    for index, share in enumerate(np.geomspace(*SHARES, MASKS)):
        radius = LOW_SIDE * np.sqrt(share / np.pi)
        logits[index] = blob(random, LOW_SIDE, radius, tuple(random.uniform(0.7 * radius, LOW_SIDE - 0.7 * radius, 2)))
    return logits


def masks_of(logits: Floats) -> list[Mask]:
    """Ours, as the engines do it."""
    return [mask_of(logits_hw, FRAME, 0.9) for logits_hw in logits]


def files_of(masks: list[Mask]) -> tuple[bytes, bytes]:
    """Ours, as the handlers do it: PNG and JSON."""
    instances = [Instance(mask, LABEL) for mask in masks]
    return mask_png(masks, colours(len(masks)), SIZE_WH), dataset(instances, SIZE_WH, "photo.jpg")


def obvious_masks_of(logits: Floats) -> list[npt.NDArray[np.bool_]]:
    """Enlarge, then threshold. One by one, which the library does not: it would need 5 GB for all of them as floats."""
    import torch

    size_hw, found = (SIZE_WH[1], SIZE_WH[0]), []
    for logits_hw in torch.from_numpy(logits)[:, None, None]:
        full = torch.nn.functional.interpolate(logits_hw, size_hw, mode="bilinear", align_corners=False)
        found.append((full[0, 0] > 0).numpy())
    return found


def obvious_files_of(masks: list[npt.NDArray[np.bool_]]) -> tuple[bytes, bytes]:
    """A label map for Pillow, and every full mask through pycocotools."""
    from pycocotools import mask as coco_mask

    label_hw = np.zeros((SIZE_WH[1], SIZE_WH[0]), dtype=np.uint8)
    areas = [int(mask_hw.sum()) for mask_hw in masks]
    for index in sorted(range(len(masks)), key=lambda index: -areas[index]):
        label_hw[masks[index]] = index + 1
    image = Image.fromarray(label_hw)
    image.putpalette(bytes(3) + b"".join(bytes(colour) for colour in colours(len(masks))))
    png = io.BytesIO()
    image.save(png, "PNG", transparency=0)
    annotations = []
    for index, mask_hw in enumerate(masks):
        rle = coco_mask.encode(np.asfortranarray(mask_hw.astype(np.uint8)))
        annotation = {"id": index + 1, "image_id": 1, "category_id": 1, "iscrowd": 0, "score": 0.9, "area": areas[index]}
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
        annotations.append({**annotation, "bbox": coco_mask.toBbox(rle).tolist(), "segmentation": segmentation})
    head = {"id": 1, "width": SIZE_WH[0], "height": SIZE_WH[1], "file_name": "photo.jpg"}
    document = {"images": [head], "categories": [{"id": 1, "name": LABEL}], "annotations": annotations}
    return png.getvalue(), json.dumps(document, separators=(",", ":")).encode()


def times() -> dict[str, Any]:
    """Milliseconds of each step, round by round, and how well the masks agree at worst."""
    logits = answers()
    files_of(masks_of(logits))  # warms up
    found: dict[str, Any] = {"masks": [], "files": [], "obvious masks": [], "obvious files": []}
    for _ in range(ROUNDS):
        marks = [time.perf_counter()]
        masks = masks_of(logits)
        marks.append(time.perf_counter())
        _, ours = files_of(masks)
        marks.append(time.perf_counter())
        full = obvious_masks_of(logits)
        marks.append(time.perf_counter())
        _, obvious = obvious_files_of(full)
        marks.append(time.perf_counter())
        for name, seconds in zip(found, np.diff(marks), strict=True):
            found[name].append(seconds * 1000)
    return {**found, "iou": least_iou(ours, obvious)}


def least_iou(ours: bytes, obvious: bytes) -> float:
    """Of the masks of two datasets, one by one."""
    from pycocotools import mask as coco_mask

    pairs = zip(*([entry["segmentation"] for entry in json.loads(file)["annotations"]] for file in (ours, obvious)), strict=True)
    return min(float(coco_mask.iou([mine], [other], [0])[0, 0]) for mine, other in pairs)


def peak(side: str) -> int:
    """How far this process grows while one side makes its files, in bytes; libraries and answers are there before."""
    for library in NEEDED:
        importlib.import_module(library)
    logits = answers()
    before = held_bytes()
    if side == "ours":
        files_of(masks_of(logits))
    else:
        obvious_files_of(obvious_masks_of(logits))
    return held_bytes(highest=True) - before


if __name__ == "__main__":
    print(json.dumps(times() if sys.argv[1] == "times" else peak(sys.argv[2])))
