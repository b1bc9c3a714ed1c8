"""Combining: 100 masks of an image of 12 megapixels, from the COCO JSON of a blob to label PNG and COCO JSON, one thread.

The obvious way decodes every mask with pycocotools to a full-size array, combines these with numpy, and encodes the one that
is left with Pillow and pycocotools.
"""

from __future__ import annotations

import io
import json
import time
from typing import Any

import cv2
import numpy as np
import orjson
from bench.blobs import blob
from bench.child import answer, lacks
from bench.ground import Ground
from bench.report import Report, ratios
from PIL import Image
from support.engines import never_stop

from handlers import combine_masks
from handlers._coco import dataset
from handlers._instances import Instance
from handlers.base import Job, Limits, Request
from models.base import Mask, Models, pack
from models.cache import EmbeddingCache

MASKS, SIZE_WH = 100, (4000, 3000)
SHARES = (0.001, 0.15)
"""The smallest and the largest mask, of the image."""
ROUNDS = 5
TASK = "0b0c6e5e-6f3f-4a52-9a0d-3a5a3a6d7b11"
OPERATIONS = {"union": np.logical_or, "intersection": np.logical_and, "difference": np.greater, "xor": np.logical_xor}
NEEDED = ("pycocotools",)


def run(_: Ground, report: Report) -> None:
    """Both sides in one process, neighbours in time."""
    report.title("combine", f"{MASKS} masks of 0.1 to 15 % of 12 megapixels, blob bytes to label PNG and COCO JSON, one thread")
    if lacks(report, NEEDED):
        return
    found = answer("bench.combine")
    for operation in OPERATIONS:
        ours, obvious = found[operation]
        report.side(f"{operation}, ours", ours, "ms")
        report.side(f"{operation}, obvious (full-size bool)", obvious, "ms")
        report.at_least(f"{operation}: obvious / ours", ratios(obvious, ours), 10)
        report.at_most(f"{operation}: ours, ms", ours, 300)
    report.at_least("share of operations with equal masks", [found["equal"]], 1)


def masks() -> list[Mask]:
    """Blobs of many sizes, all over the image."""
    random, found = np.random.default_rng(7), []
    for share in np.geomspace(*SHARES, MASKS):
        radius = np.sqrt(share * SIZE_WH[0] * SIZE_WH[1] / np.pi)
        side = int(2.6 * radius)
        shape_hw = blob(random, 256, 256 / 2.6, (128.0, 128.0)) > 0
        crop_hw = cv2.resize(shape_hw.astype(np.float32), (side, side)) > 0.5
        x, y = (int(random.uniform(0, most - side)) for most in SIZE_WH)
        found.append(pack(crop_hw, (x, y)))
    return found


def ours(data: bytes, operation: str) -> bytes:
    """As the daemon does it, parsing of the row included: the COCO JSON, beside the PNG."""
    request = Request("combine_masks", None, None, {"masks": [{"task_id": TASK}], "op": operation})
    wish = combine_masks.parse(request, Limits())
    (ref,) = combine_masks.inputs(wish).masks
    job, models = Job("task", wish, masks={ref.name: orjson.loads(data)}), Models(EmbeddingCache(0))
    (raw,) = combine_masks.run([combine_masks.prepare(job, models)], models, never_stop)
    assert isinstance(raw, combine_masks.Answer), raw
    return combine_masks.finish(job, raw).blobs[1].data


def obvious(data: bytes, operation: str) -> bytes:
    """Full-size arrays, one at a time."""
    from pycocotools import mask as coco_mask

    document, together = json.loads(data), None
    for annotation in document["annotations"]:
        mask_hw = coco_mask.decode(annotation["segmentation"]).astype(np.bool_)
        together = mask_hw if together is None else OPERATIONS[operation](together, mask_hw)
    assert together is not None
    image = Image.fromarray(together.astype(np.uint8))
    image.putpalette(bytes((0, 0, 0, 255, 0, 0)))
    image.save(io.BytesIO(), "PNG", transparency=0)
    rle = coco_mask.encode(np.asfortranarray(together.astype(np.uint8)))
    segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    document["annotations"] = [{"id": 1, "area": int(together.sum()), "segmentation": segmentation}]
    return json.dumps(document).encode()


def times() -> dict[str, Any]:
    """Milliseconds of both sides per operation, round by round, and whether they answer the same."""
    data = dataset([Instance(mask, "thing") for mask in masks()], SIZE_WH, "photo.jpg")
    found: dict[str, Any] = {}
    equal = 0
    ours(data, "union")  # warms up
    for operation in OPERATIONS:
        marks, rounds = [time.perf_counter()], []
        for _ in range(ROUNDS):
            mine = ours(data, operation)
            marks.append(time.perf_counter())
            theirs = obvious(data, operation)
            marks.append(time.perf_counter())
        rounds = np.diff(marks) * 1000
        found[operation] = rounds[::2].tolist(), rounds[1::2].tolist()
        equal += same(mine, theirs)
    return {**found, "equal": equal / len(OPERATIONS)}


def same(mine: bytes, theirs: bytes) -> bool:
    """Whether both found the same mask, or ours none where theirs is empty."""
    mine_found, their_found = (json.loads(file)["annotations"] for file in (mine, theirs))
    if not mine_found:
        return bool(their_found[0]["area"] == 0)
    return bool(mine_found[0]["segmentation"] == their_found[0]["segmentation"])


if __name__ == "__main__":
    print(json.dumps(times()))
