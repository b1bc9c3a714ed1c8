"""Removing one object of 300 pixels from a photo of 12 megapixels, one thread: what a row costs beyond decoding, the network
on its crop, and encoding.

Ours is a whole job: decode, prepare, run, finish with its three files. Bare are those three steps on arrays that are ready. The
network is a small one of random weights in LaMa's form; both sides call it on the same crop, and their difference is judged.
"""

from __future__ import annotations

import io
import json
import time
from typing import Any

import numpy as np
from bench.child import answer, lacks
from bench.ground import Ground
from bench.report import Report
from PIL import Image
from support.engines import never_stop
from support.photos import photo

from handlers import remove_object
from handlers._images_out import Picture, encoded
from handlers.base import Job, Limits, Request, SourceImage
from models.base import Hole, Models
from models.cache import EmbeddingCache
from storage.images import decode

NEEDED = ("torch", "transformers")
SIZE_WH, SIDE = (4000, 3000), 300
CORNER_XY = (1800, 1300)
ROUNDS = 5
OVERHEAD_MS_MAX = 150
BYTES_MAX, PIXELS_MAX = 50_000_000, 50_000_000


def run(_: Ground, report: Report) -> None:
    """Both sides in one process, neighbours in time."""
    report.title("remove", f"an object of {SIDE} pixels out of 12 megapixels, JPEG in, PNG out, one thread")
    if lacks(report, NEEDED):
        return
    found = answer("bench.remove")
    report.side("a whole job", found["ours"], "ms")
    report.side("decode, network on the crop, encode", found["bare"], "ms")
    over = [mine - bare for mine, bare in zip(found["ours"], found["bare"], strict=True)]
    report.at_most("milliseconds over the bare steps", over, OVERHEAD_MS_MAX)


def times() -> dict[str, Any]:
    """Milliseconds of both sides, round by round."""
    from support.inpaint_checkpoints import script

    from models.lama import load
    from models.torch_device import Placement

    engine = load(script(), Placement(), 1)
    models = Models(EmbeddingCache(0), inpaint=engine)
    data = jpeg()
    found: dict[str, list[float]] = {"ours": [], "bare": []}
    for number in range(ROUNDS + 1):
        marks = [time.perf_counter()]
        mask = job(data, models)
        marks.append(time.perf_counter())
        bare(data, engine, mask)
        marks.append(time.perf_counter())
        if number:  # the first round warms up
            for name, took in zip(found, np.diff(marks), strict=True):
                found[name].append(float(took) * 1000)
    return found


def jpeg() -> bytes:
    """The upload."""
    file = io.BytesIO()
    Image.fromarray(photo("astronaut")).resize(SIZE_WH, Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
    return file.getvalue()


def job(data: bytes, models: Models) -> Any:
    """A row from its bytes to its files; the mask that was used."""
    decoded = decode(data, bytes_max=BYTES_MAX, pixels_max=PIXELS_MAX)
    x, y = CORNER_XY
    square = [[x, y], [x + SIDE, y], [x + SIDE, y + SIDE], [x, y + SIDE]]
    params = remove_object.parse(Request("remove_object", "a.jpg", None, {"masks": [{"polygon": square}]}), Limits())
    task = Job("task", params, SourceImage(decoded.pixels_hwc, decoded.content_hash, "a.jpg"))
    (raw,) = remove_object.run([remove_object.prepare(task, models)], models, never_stop)
    assert not isinstance(raw, Exception), raw
    remove_object.finish(task, raw)
    return raw.mask


def bare(data: bytes, engine: Any, mask: Any) -> None:
    """What no way of doing it can save."""
    decoded = decode(data, bytes_max=BYTES_MAX, pixels_max=PIXELS_MAX)
    engine.inpaint([Hole(decoded.pixels_hwc, mask)], never_stop)
    encoded(Picture(decoded.pixels_hwc, None, None), "PNG", 90)


if __name__ == "__main__":
    print(json.dumps(times()))
