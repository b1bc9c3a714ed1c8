"""Tasks of every kind in small: what a row could ask for, and the way from a request to a result without a daemon."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from support.checkpoints import engine as mobile_sam
from support.engines import never_stop
from support.photos import photo
from support.sam2_checkpoints import engine as sam2
from support.sam3_checkpoints import engine as sam3

from handlers.base import Handler, Job, Limits, Request, Result, SourceImage
from models.base import Models
from models.cache import EmbeddingCache
from models.classical import Classical
from models.mock import Mock

EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "segment_visual": {
        "objects": [
            {"box": [70, 10, 480, 385]},
            {"points": [{"x": 280, "y": 150}, [10, 390, 0]]},
        ]
    },
    "segment_concept": {"texts": ["cup", "spoon"], "threshold": 0.3},
    "segment_everything": {"min_mask_area": 50, "box_nms_thresh": 0.6, "points_per_side": 8, "stability_score_thresh": 0.3},
}
"""Per kind the params of a task on coffee.jpg (600 x 400)."""

MAKERS: Mapping[str, Callable[[], Any]] = {
    "classical": Classical,
    "mobilesam": mobile_sam,
    "sam2": sam2,
    "sam3": sam3,
    "mock": Mock,
}
ENGINES = tuple(MAKERS)


def source(name: str = "coffee") -> SourceImage:
    """A sample photo as fetch would hand it over."""
    pixels_hwc = photo(name)
    return SourceImage(pixels_hwc, hashlib.sha256(pixels_hwc.tobytes()).hexdigest(), f"{name}.jpg")


def models_of(engine: str, bytes_max: int = 100_000_000) -> Models:
    """One engine in all roles that it has, with a cache of its own."""
    model = MAKERS[engine]()
    return Models(EmbeddingCache(bytes_max), visual=model, everything=model, concept=model if hasattr(model, "find") else None)


def job_of(handler: Handler, params: Mapping[str, Any], text: str | None = None, name: str = "coffee") -> Job:
    """A parsed task on a sample photo."""
    request = Request("kind", f"uploads/u/{name}.jpg", text, params)
    return Job("task", handler.parse(request, Limits()), source(name))


def answers(handler: Handler, jobs: Sequence[Job], models: Models) -> Sequence[Any]:
    """What `run` says to these jobs, in one batch."""
    return handler.run([handler.prepare(job, models) for job in jobs], models, never_stop)


def done(handler: Handler, job: Job, models: Models) -> Result:
    """The result of one job; an exception in its place is raised."""
    (raw,) = answers(handler, [job], models)
    if isinstance(raw, Exception):
        raise raw
    return handler.finish(job, raw)


def blob(result: Result, column: str) -> bytes:
    """The file of a result that a column will point to."""
    return next(file.data for file in result.blobs if file.column == column)
