"""Sessions: what uploads and clicks cost over HTTP beyond the network, also beside a backlog of tasks; what a thousand weigh.

Full-size MobileSAM of random weights on all cores, which server and clients share in one process. Bare is the model's
own calls on the same threads.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
import uuid
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import count
from typing import Any

import numpy as np
from bench.child import answer, held_bytes, lacks
from bench.ground import Ground
from bench.mobile_sam import POINT, bare_feeds
from bench.report import Report, percentile
from PIL import Image
from support.desk import Counter, a_pool, a_store, counter
from support.photos import photo
from support.pictures import saved
from support.works import a_task

from daemon.infer import Pool
from daemon.work import Work
from handlers import segment_visual
from handlers.base import Job, Limits, Request, SourceImage
from models.base import Models
from models.cache import EmbeddingCache
from models.mock import Mock

NEEDED = ("torch", "onnx", "onnxruntime")
SIZE_WH = (4000, 3000)
UPLOADS, CLICKS, LOADED_CLICKS = 6, 16, 12
CLIENTS = (1, 4, 16)
BACKLOG = 6
SESSIONS = 1000
MB = 1024 * 1024
SESSIONS_MB, EMBEDDINGS_MB = 128, 64
SLACK_MS = 15
P95_MS = 2500


def run(ground: Ground, report: Report) -> None:
    """Latencies in this process, memory in one of its own."""
    threads = os.cpu_count() or 1
    report.title(
        "sessions", f"uploads of 12 megapixels and clicks over HTTP by the bare network, on {threads} threads (the targets say 4)"
    )
    if lacks(report, NEEDED):
        return
    from support.checkpoints import engine

    asyncio.run(measure(Timed(engine(full=True, threads=threads)), threads, report))
    figures = answer("bench.sessions")
    report.note(f"{SESSIONS:,} sessions, bounds of {SESSIONS_MB} MiB of sources and {EMBEDDINGS_MB} MiB of embeddings")
    report.side("in the store", [figures["stored"] / MB], "MiB")
    report.side("the process grew by", [figures["grown"] / MB], "MiB")
    report.at_least("sessions that live / created", [figures["live"] / SESSIONS], 1.0)
    report.at_most("grown / both bounds", [figures["grown"] / ((SESSIONS_MB + EMBEDDINGS_MB) * MB)], 1.0)


class Timed:
    """The engine, with the milliseconds of each of its embeddings: the longest step that nothing interrupts."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.embed_ms: list[float] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def embed(self, smalls: Sequence[Any]) -> Any:
        began = time.perf_counter()
        embeddings = self._model.embed(smalls)
        self.embed_ms.append((time.perf_counter() - began) * 1000)
        return embeddings


async def measure(model: Timed, threads: int, report: Report) -> None:
    """Uploads, clicks, and clicks beside a backlog."""
    image_hwc = np.asarray(Image.fromarray(photo("astronaut")).resize(SIZE_WH, Image.Resampling.BICUBIC))
    data = saved(Image.fromarray(image_hwc), "JPEG", quality=92)
    numbers = count()
    cache = EmbeddingCache(200 * MB)
    kinds: Any = {"segment_visual": segment_visual}
    pool = a_pool(Models(cache, visual=model, everything=model), kinds, threads=threads, asks_max=64)  # type: ignore[arg-type]
    async with counter(model, pool=pool, cache=cache, threads=threads, waiting_max=64) as desk:

        async def upload() -> str:
            return await desk.session(data + str(next(numbers)).encode())  # another file of the same picture

        session_id = await upload()
        await uploads(upload, model, image_hwc, report)
        idle = await clicks(desk, session_id, model, threads, report)
        await beside_backlog(desk, session_id, pool, model, idle, report)


async def uploads(upload: Callable[[], Awaitable[str]], model: Timed, image_hwc: Any, report: Report) -> None:
    """One client, one upload after the other, each beside its bare calls; then four clients at once."""
    ours, bare = [], []
    for _ in range(UPLOADS):
        bare.append(timed_ms(lambda: model.embed([model.shrink(image_hwc)])))
        ours.append(await spent_ms(upload))
    report.side("POST /session, 12 megapixels, p95", [percentile(ours, 95)], "ms")
    report.side("POST /session, 12 megapixels, median", ours, "ms")
    report.side("shrink + encoder, bare", bare, "ms")
    report.at_most(f"p95 / {P95_MS} ms", [percentile(ours, 95) / P95_MS], 1.0)
    over(report, "POST /session, best of each", min(ours), min(bare))
    four = await spent_ms(lambda: asyncio.gather(*[upload() for _ in range(4)]))
    four_bare = timed_ms(lambda: [model.embed([model.shrink(image_hwc)]) for _ in range(4)])
    report.side("4 clients at once, until all are answered", [four], "ms")
    report.side("4 x shrink + encoder, bare", [four_bare], "ms")
    over(report, "4 clients", four, four_bare, 4 * SLACK_MS)


async def clicks(desk: Counter, session_id: str, model: Timed, threads: int, report: Report) -> list[float]:
    """Per number of clients milliseconds a click by the bare decoder, on as many threads at once; the latencies of one client."""
    _, feeds = bare_feeds(model, np.asarray(photo("astronaut")))
    body = {"points": [[POINT[0] * SIZE_WH[0], POINT[1] * SIZE_WH[1]]]}

    def decode(_: int) -> Any:
        return model.decoder.run(["iou_predictions", "low_res_masks"], feeds)

    async def click() -> None:
        await desk.masks(session_id, **body)

    async def several(count: int, clients: int, latencies: list[float]) -> None:
        for _ in range(count // clients):
            latencies.extend(await asyncio.gather(*[spent_ms(click) for _ in range(clients)]))

    latencies: dict[int, list[float]] = {}
    for clients in CLIENTS:
        found = latencies[clients] = []
        bare, ours = [], []
        for _ in range(2):
            bare.append(timed_ms(partial(on_threads, min(clients, threads), decode)) / CLICKS)
            ours.append(await spent_ms(partial(several, CLICKS, clients, found)) / CLICKS)
        report.side(f"/predict, {clients} client(s): ms per click", ours, "ms")
        report.side("decoder, bare", bare, "ms")
        report.side(f"/predict, {clients} client(s): latency p95", [percentile(found, 95)], "ms")
        over(report, f"/predict, {clients} client(s)", min(ours), min(bare))
    return latencies[CLIENTS[0]]


def on_threads(threads: int, call: Callable[[int], object]) -> None:
    """As many calls as clicks are measured, on so many threads at once."""
    with ThreadPoolExecutor(threads) as executor:
        list(executor.map(call, range(CLICKS)))


async def beside_backlog(desk: Counter, session_id: str, pool: Pool, model: Timed, idle: list[float], report: Report) -> None:
    """Clicks while the pool always has tasks, each with an image of its own to embed."""
    image_hwc = np.asarray(photo("astronaut"))
    model.embed_ms.clear()
    pool.on_answers = lambda works, answers: pool.put([row(image_hwc)])
    pool.put([row(image_hwc) for _ in range(BACKLOG)])
    loaded = [await spent_ms(lambda: desk.masks(session_id, points=[[1720, 900]])) for _ in range(LOADED_CLICKS)]
    pool.on_answers = lambda works, answers: None
    longest = max(model.embed_ms)
    report.side("click p95, idle", [percentile(idle, 95)], "ms")
    report.side(f"click p95 beside tasks ({len(model.embed_ms)} embedded)", [percentile(loaded, 95)], "ms")
    report.side("longest step that nothing interrupts", [longest], "ms")
    report.at_most("p95 beside tasks / (idle p95 + that step)", [percentile(loaded, 95) / (percentile(idle, 95) + longest)], 1.0)


def row(image_hwc: Any) -> Work:
    """A task on an image that nobody has seen."""
    params = segment_visual.parse(Request("segment_visual", "a.jpg", None, {"points": [[200, 100]]}), Limits())
    job = Job("task", params, SourceImage(image_hwc, str(uuid.uuid4()), "photo.jpg"))
    return Work(a_task(), segment_visual, "cpu", params=params, job=job)  # type: ignore[arg-type]


def over(report: Report, name: str, ours_ms: float, bare_ms: float, slack_ms: float = SLACK_MS) -> None:
    """What is beyond the bare calls, by a tenth of them and a few milliseconds."""
    report.at_most(
        f"{name}: {ours_ms - bare_ms:.0f} ms beyond / allowed", [(ours_ms - bare_ms) / (0.1 * bare_ms + slack_ms)], 1.0
    )


def timed_ms(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1000


async def spent_ms(call: Callable[[], Awaitable[object]]) -> float:
    began = time.perf_counter()
    await call()
    return (time.perf_counter() - began) * 1000


async def weigh() -> dict[str, int]:
    """A thousand sessions of one small picture, each another file."""
    data = saved(Image.fromarray(photo("chelsea")).resize((227, 150)), "PNG")
    async with counter(
        Mock(), store=a_store(sessions_max=SESSIONS, bytes_max=SESSIONS_MB * MB), cache=EmbeddingCache(EMBEDDINGS_MB * MB)
    ) as desk:
        for number in range(20):
            await desk.session(data + bytes(number))
        await desk.client.delete("/session")
        before = held_bytes()
        for number in range(SESSIONS):
            await desk.session(data + str(number).encode())
        live, stored = await desk.sessions.store.count()
        return {"live": live, "stored": stored, "grown": held_bytes() - before}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(weigh())))
    sys.exit(0)
