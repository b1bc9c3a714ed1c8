"""Daemons with a simulated GPU each, in a process of their own: `python -m bench.simulated '{"dsn": …, "daemons": 1, …}'`.

Everything of a daemon is the production's but two things: the device's thread sleeps for its service time, and blobs are
counted instead of stored, since a bucket is not what is measured. A line on standard input (`mark`) is answered by one line of
JSON: what happened since the last one.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

import psutil
import uvloop
from bench.ground import KIND
from bench.noop import settings

from daemon import log, wake
from daemon.config import Config, load
from daemon.engines import Station
from daemon.main import Daemon, build_session_store
from handlers.base import Inputs, Job, Limits, Request, Result, ResultBlob
from models.base import Models, Role, Stop
from models.cache import EmbeddingCache
from models.mock import Mock
from storage.base import Claimed

NOTHING = Inputs(source=False)
LABEL = {"id": 1, "label": "cup", "score": 0.93, "box": [61, 12, 379, 288], "area": 51234, "color": "#E6194B", "object": 0}
METADATA = {
    "engine": "simulated",
    "model": "a device that sleeps",
    "device": "simulated",
    "precision": "bf16",
    "image_size": [1414, 1414],
    "confidence": 0.93,
    "count": 3,
    "embedding_cached": False,
    "warnings": [],
}
FILES = (("mask_image_url", "mask.png", "image/png"), ("masks_url", "masks.json", "application/json"))


@dataclass(slots=True)
class Seen:
    """What all daemons of this process did since the last mark. Threads only append and add under the lock of the interpreter."""

    images: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    claims_ms: list[float] = field(default_factory=list)

    def take(self, cpu_seconds: float) -> dict[str, Any]:
        """All of it as JSON, and a new beginning."""
        found = {"images": self.images, "calls": self.calls, "claims_ms": self.claims_ms, "cpu_seconds": cpu_seconds}
        self.images, self.calls, self.claims_ms = 0, Counter(), []
        return found


class Simulated:
    """A kind on a simulated GPU: so many seconds an image, then a result as large as that of three instances."""

    ROLES = frozenset({Role.VISUAL})
    TIMEOUT_FACTOR = 1.0

    def __init__(self, image_seconds: float, batch: int, seen: Seen) -> None:
        self.BATCH_MAX = batch
        self._image_seconds = image_seconds
        self._seen = seen

    def parse(self, request: Request, limits: Limits) -> None:
        return None

    def inputs(self, params: Any) -> Inputs:
        return NOTHING

    def prepare(self, job: Job, models: Models) -> Job:
        return job

    def run(self, prepared: Sequence[Job], models: Models, stop: Stop) -> Sequence[str]:
        self._seen.images += len(prepared)
        if self._image_seconds:
            threading.Event().wait(self._image_seconds * len(prepared))
        return [job.task_id for job in prepared]

    def finish(self, job: Job, raw: str) -> Result:
        blobs = tuple(ResultBlob(column, name, media, b"") for column, name, media in FILES)  # type: ignore[arg-type]
        return Result(blobs, [LABEL] * 3, METADATA)


class NoBlobs:
    """A bucket that takes everything and keeps nothing."""

    def get(self, key: str, bytes_max: int) -> bytes:
        raise AssertionError("no row here names an image")

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Stored, as far as the daemon can tell."""

    def delete(self, keys: Sequence[str]) -> None:
        """There is nothing."""

    def list(self, prefix: str, limit: int) -> list[str]:
        return []

    def probe(self) -> None:
        """It is there."""


class Watched:
    """A store whose calls are counted and whose claims are timed."""

    def __init__(self, store: Any, seen: Seen) -> None:
        self._store = store
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        self._seen.calls[name] += 1
        return getattr(self._store, name)

    async def claim(self, worker: str, token: str, kinds: Sequence[str], most: int) -> Claimed:
        started = time.perf_counter()
        claimed: Claimed = await self._store.claim(worker, token, kinds, most)
        self._seen.calls["claim" if claimed.tasks else "empty claim"] += 1
        if claimed.tasks:
            self._seen.claims_ms.append((time.perf_counter() - started) * 1000)
        return claimed


class SimulatedDaemon(Daemon):
    """The production's daemon whose only station is a simulated GPU."""

    def __init__(self, config: Config, handler: Simulated, seen: Seen) -> None:
        cache = EmbeddingCache(0, 1.0)
        super().__init__(config, {KIND: handler}, NoBlobs(), cache, build_session_store(config))
        self.store = Watched(self.store, seen)  # type: ignore[assignment]

    async def _load(self) -> None:
        self.stations = [Station("gpu0", "simulated", Models(self.cache, visual=Mock(device="simulated")))]


async def serve(dsn: str, daemons: int, image_seconds: float, batch: int, turns: bool = True, **more: str) -> None:
    """Run so many daemons until the input ends. Without `turns` a hint makes all of them look at once."""
    if not turns:
        wake.TURN_SECONDS = wake.YIELD_SECONDS = 0.0
    seen, process, spent = Seen(), psutil.Process(), 0.0
    async with AsyncExitStack() as stack:
        fleet = []
        for _ in range(daemons):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            config = load(settings(dsn, folder, MASKD_CPU_THREADS="1", **more))
            log.set_up(config.log_level, config.log_format, [])
            fleet.append(SimulatedDaemon(config, Simulated(image_seconds, batch, seen), seen))
        async with asyncio.TaskGroup() as tasks:
            for daemon in fleet:
                tasks.create_task(daemon.run())
                await daemon.ready.wait()
            say({"ready": daemons})
            while (await asyncio.to_thread(sys.stdin.readline)).strip() == "mark":
                times = process.cpu_times()
                total = times.user + times.system
                say(seen.take(total - spent))
                spent = total
            for daemon in fleet:
                daemon.drain()


def say(answer: dict[str, Any]) -> None:
    """One line of JSON on standard output."""
    print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    uvloop.run(serve(**json.loads(sys.argv[1])))
