"""MobileSAM: what a task costs beyond the network itself, with full-size files of random weights, on one thread.

Ours is a job through the daemon's pool: prepare, embed, decode, PNG and COCO. Bare is `session.run` on arrays that are ready.
"""

from __future__ import annotations

import asyncio
import importlib.util
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from bench.ground import Ground
from bench.report import Report, ratios
from PIL import Image
from support.photos import photo
from support.works import a_task

from daemon.infer import Pool
from daemon.journal import Journal
from daemon.steps import Answer
from daemon.work import Work
from handlers import segment_visual
from handlers.base import Job, Limits, Request, Result, SourceImage
from models.base import Models
from models.cache import EmbeddingCache

ROUNDS = 5
CLICKS = 10
SIDE = 1414  # 2 megapixels
NEEDED = ("torch", "onnx", "onnxruntime")
POINT = (0.43, 0.3)


def run(ground: Ground, report: Report) -> None:
    """Measure in interleaved rounds."""
    report.title("mobile_sam", "embed and clicks through the pool, by the bare sessions, one thread, photo of 2 megapixels")
    lacking = [module for module in NEEDED if importlib.util.find_spec(module) is None]
    if lacking:
        report.note(f"skipped: it needs {', '.join(lacking)}")
        return
    from support.checkpoints import engine

    asyncio.run(measure(engine(full=True, threads=1), report))


async def measure(model: Any, report: Report) -> None:
    """Rounds of both sides, neighbours in time."""
    image_hwc = np.asarray(Image.fromarray(photo("astronaut")).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    pool = OnePool(model)
    feeds = bare_feeds(model, image_hwc)
    first: list[float] = []
    tenth: list[float] = []
    bare_both: list[float] = []
    bare_click: list[float] = []
    for number in range(ROUNDS + 1):
        source = SourceImage(image_hwc, str(uuid.uuid4()), "photo.jpg")
        clicks = [await pool.seconds(source) for _ in range(CLICKS)]
        encoder = timed(lambda: model.encoder.run(None, feeds[0]))
        decoders = [timed(lambda: model.decoder.run(["iou_predictions", "low_res_masks"], feeds[1])) for _ in range(CLICKS)]
        if number:  # the first round warms up
            first.append(clicks[0] * 1000)
            tenth.append(clicks[-1] * 1000)
            bare_both.append((encoder + decoders[0]) * 1000)
            bare_click.append(decoders[-1] * 1000)
    report.side("embed + first click, through the pool", first, "ms")
    report.side("encoder + decoder, bare", bare_both, "ms")
    report.side("tenth click, through the pool", tenth, "ms")
    report.side("decoder, bare", bare_click, "ms")
    report.at_most("embed + first click / bare", ratios(first, bare_both), 1.15)
    report.at_most("tenth click / bare decoder", ratios(tenth, bare_click), 1.3)


class OnePool:
    """The daemon's pool with one thread and one engine, one job at a time."""

    def __init__(self, model: Any) -> None:
        self._pool = Pool(
            "cpu",
            Models(EmbeddingCache(100_000_000), visual=model, everything=model),
            {"segment_visual": segment_visual},  # type: ignore[dict-item]
            threads=1,
            prefetch_batches=1,
            sizes={"segment_visual": 1},
            timeout_seconds=60.0,
            journal=Journal(None, "bench", "bench"),
        )
        self._pool.on_answers = self._take
        self._answers: asyncio.Queue[Answer] = asyncio.Queue()

    async def seconds(self, source: SourceImage) -> float:
        """How long a click on this image takes, from a fetched job to encoded files."""
        wish = {"points": [[POINT[0] * SIDE, POINT[1] * SIDE]]}
        params = segment_visual.parse(Request("segment_visual", "a.jpg", None, wish), Limits())
        work = Work(a_task(), segment_visual, "cpu", params=params, job=Job("task", params, source))  # type: ignore[arg-type]
        began = time.perf_counter()
        self._pool.put([work])
        answer = await self._answers.get()
        took = time.perf_counter() - began
        assert isinstance(answer, Result), answer
        return took

    def _take(self, works: Sequence[Work], answers: Sequence[Answer]) -> None:
        for answer in answers:
            self._answers.put_nowait(answer)


def bare_feeds(model: Any, image_hwc: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the two sessions take for that photo and click."""
    side, low = model.contract.side, model.contract.low_side
    square_hwc = np.asarray(Image.fromarray(image_hwc).resize((side, side), Image.Resampling.BILINEAR)).astype(np.float32)
    given = {model.contract.input_name: square_hwc}
    point = [POINT[0] * side, POINT[1] * side]
    click = {
        "image_embeddings": model.encoder.run(None, given)[0],
        "point_coords": np.array([[point, [0, 0]]], dtype=np.float32),
        "point_labels": np.array([[1, -1]], dtype=np.float32),
        "mask_input": np.zeros((1, 1, low, low), dtype=np.float32),
        "has_mask_input": np.zeros(1, dtype=np.float32),
        "orig_im_size": np.array([low, low], dtype=np.float32),
    }
    return given, click


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began
