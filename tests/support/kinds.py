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
from models.base import Models, Role
from models.cache import EmbeddingCache
from models.classical import Classical
from models.mock import Mock
from models.telea import Telea

CUP = [[170, 60], [390, 60], [430, 200], [330, 300], [200, 280], [140, 160]]
SPOON = [[315, 250], [345, 230], [385, 240], [400, 290], [360, 310], [325, 300]]
EXAMPLES: Mapping[str, Mapping[str, Any]] = {
    "segment_visual": {
        "objects": [
            {"box": [70, 10, 480, 385]},
            {"points": [{"x": 280, "y": 150}, [10, 390, 0]]},
        ]
    },
    "segment_concept": {"texts": ["cup", "spoon"], "threshold": 0.3},
    "segment_everything": {"min_mask_area": 50, "box_nms_thresh": 0.6, "points_per_side": 8, "stability_score_thresh": 0.3},
    "combine_masks": {"masks": [{"polygon": CUP}, {"polygon": SPOON}], "op": "difference"},
    "paint_masks": {
        "layers": [{"mask": {"polygon": CUP}, "color": "#00F", "opacity": 0.5}, {"mask": {"polygon": SPOON}}],
        "format": "jpg",
    },
    "convert_image": {"format": "webp", "max_side": 300},
    "remove_object": {"points": [[355, 270]], "masks": [{"polygon": SPOON}]},
    "fill_object": {"boxes": [[70, 10, 480, 385]], "seed": 7, "steps": 2},
    "replace_background": {"boxes": [[70, 10, 480, 385]], "color": "#204060"},
}
"""Per kind the params of a task on coffee.jpg (600 x 400)."""
TEXTS = {"fill_object": "a bowl of soup"}
"""What kinds that need one have as text_prompt."""

NO_ENGINE = "none"
MAKERS: Mapping[str, Callable[[], Any]] = {
    "classical": Classical,
    "mobilesam": mobile_sam,
    "sam2": sam2,
    "sam3": sam3,
    "mock": Mock,
}
ENGINES = tuple(MAKERS)
SERVES: Mapping[str, frozenset[Role]] = {
    "classical": frozenset({Role.VISUAL, Role.EVERYTHING, Role.INPAINT}),
    "mobilesam": frozenset({Role.VISUAL, Role.EVERYTHING}),
    "sam2": frozenset({Role.VISUAL, Role.EVERYTHING}),
    "sam3": frozenset({Role.VISUAL, Role.EVERYTHING, Role.CONCEPT}),
    "mock": frozenset(Role),
}
"""Which roles each has, with Telea's method beside the classical engine."""


def source(name: str = "coffee") -> SourceImage:
    """A sample photo as fetch would hand it over."""
    pixels_hwc = photo(name)
    return SourceImage(pixels_hwc, hashlib.sha256(pixels_hwc.tobytes()).hexdigest(), f"{name}.jpg")


def models_of(engine: str, bytes_max: int = 100_000_000) -> Models:
    """One engine in all roles that it has, with a cache of its own; no engine at all for kinds that need none."""
    if engine == NO_ENGINE:
        return Models(EmbeddingCache(bytes_max))
    model = MAKERS[engine]()
    return Models(
        EmbeddingCache(bytes_max),
        visual=model,
        everything=model,
        concept=model if hasattr(model, "find") else None,
        inpaint=Telea() if engine == "classical" else model if hasattr(model, "inpaint") else None,
        generate=model if hasattr(model, "generate") else None,
    )


def example_of(kind: str, handler: Handler) -> Job:
    """The kind's example as a job."""
    return job_of(handler, EXAMPLES[kind], TEXTS.get(kind))


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
