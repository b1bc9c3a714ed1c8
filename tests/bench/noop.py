"""A kind that does nothing, and a production daemon in this process that serves only it.

The handler is real and is the only thing injected: everything else comes from `daemon.main.build`.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from bench.ground import KIND, SECONDS_MAX

from daemon import log
from daemon.config import Config, load
from daemon.main import Daemon, build
from handlers.base import Inputs, Job, Limits, Request, Result
from models.base import Models, Stop

NOTHING = Inputs(source=False)
EMPTY = Result()


class Noop:
    """A handler that counts. `started_at` is when its last batch began, by time.perf_counter."""

    ROLES: frozenset[Any] = frozenset()
    BATCH_MAX = 100
    TIMEOUT_FACTOR = 1.0

    def __init__(self, seen: Callable[[int], None] = lambda jobs: None) -> None:
        """`seen` hears, on the pool's thread, how many jobs a batch had."""
        self.started_at = 0.0
        self.seen = seen

    def expect(self, jobs: int) -> asyncio.Event:
        """An event of this loop that is set when so many more jobs have run."""
        left, event, loop = jobs, asyncio.Event(), asyncio.get_running_loop()

        def seen(more: int) -> None:
            nonlocal left
            left -= more
            if left <= 0 < left + more:
                loop.call_soon_threadsafe(event.set)

        self.seen = seen
        return event

    def parse(self, request: Request, limits: Limits) -> None:
        return None

    def inputs(self, params: Any) -> Inputs:
        return NOTHING

    def prepare(self, job: Job, models: Models) -> None:
        return None

    def run(self, prepared: Sequence[Any], models: Models, stop: Stop) -> Sequence[Any]:
        self.started_at = time.perf_counter()
        self.seen(len(prepared))
        return [None] * len(prepared)

    def finish(self, job: Job, raw: Any) -> Result:
        return EMPTY


def settings(dsn: str, folder: str, **more: str) -> dict[str, str]:
    """The environment of a benchmark's daemon; all else has its default."""
    values = {"DATABASE_URL": dsn, "MASKD_BLOB_DIR": folder, "MASKD_STATE_DIR": f"{folder}/state", "MASKD_PORT": "0"}
    return {**values, "MASKD_LOG_LEVEL": "warning", **more}


@asynccontextmanager
async def worker(dsn: str, handler: Noop, *, seconds_max: float = SECONDS_MAX, **more: str) -> AsyncIterator[Daemon]:
    """A daemon in this event loop that claims, drained at the end."""
    with tempfile.TemporaryDirectory() as folder:
        config: Config = load(settings(dsn, folder, **more))
        log.set_up(config.log_level, config.log_format, [])
        daemon = build(config, {KIND: handler})
        async with asyncio.timeout(seconds_max), asyncio.TaskGroup() as tasks:
            tasks.create_task(daemon.run())
            await daemon.ready.wait()
            yield daemon
            daemon.drain()


async def settled(daemon: Daemon) -> None:
    """Return once every work that the daemon holds is settled."""
    assert daemon.pipeline is not None
    await daemon.pipeline.parts.held.empty()
