"""The start: models are loaded and what is outside is waited for, while the service manager hears that it goes on.

Enters: a configuration and adapters. Leaves: loaded engines, an open store whose dead are succeeded. What can never work ends
the process with a sentence; what is only away is waited for, or left to the gate.
"""

from __future__ import annotations

import time
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from daemon import systemd
from daemon.config import Config
from daemon.engines import Station, build_stations, show_ready
from daemon.lease import succeed_the_dead
from daemon.stores import address
from models.cache import EmbeddingCache
from storage.base import BlobStore, SessionStore, TaskStore, UnavailableError, UnknownFunctionError

log = structlog.get_logger(__name__)

RETRY_SECONDS = 1.0
EXTEND = "EXTEND_TIMEOUT_USEC=15000000"
EXTEND_EVERY_SECONDS = 5.0
PROBE_SECONDS = 10.0
BLOB_SECONDS = 60.0
SCHEMA_SECONDS = 60.0
"""While a deploy is under way PostgREST may not know functions that are there; after so long they are not."""


async def load(config: Config, cache: EmbeddingCache) -> list[Station]:
    """The engines, loaded on a thread while /health says starting. A wrong setting ends the process."""
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_extend_start)
        stations = await anyio.to_thread.run_sync(build_stations, config, cache, _say, abandon_on_cancel=True)
        tasks.cancel_scope.cancel()
    show_ready(stations)
    return stations


async def open_queue(store: TaskStore, config: Config, state_dir: Path) -> list[str]:
    """Wait for a database that is not there yet (a wrong one ends the process), and report the dead of this host to it.
    Returns the templates of keys."""
    begun = time.monotonic()
    while True:
        try:
            await store.open()
            await succeed_the_dead(store, state_dir, address(config), config.settle_batch_max)
            return await store.key_templates()
        except (UnavailableError, UnknownFunctionError) as error:
            if isinstance(error, UnknownFunctionError) and time.monotonic() - begun > SCHEMA_SECONDS:
                raise
            log.warning("start.waiting", reason=str(error))
            systemd.notify("STATUS=waiting for the database", EXTEND)
            await anyio.sleep(RETRY_SECONDS)


async def try_blobs(blobs: BlobStore) -> None:
    """Wrong credentials end the process with a sentence; a store that is away now is the gate's business."""
    try:
        with anyio.fail_after(PROBE_SECONDS):
            await probe(blobs)
    except (UnavailableError, TimeoutError) as error:
        log.warning("start.blobs_away", reason=str(error))


async def try_sessions(store: SessionStore) -> None:
    """The same of where sessions live: while that is away they are refused, and tasks go on."""
    try:
        await store.open()
    except UnavailableError as error:
        log.warning("start.sessions_away", reason=str(error))


async def probe(blobs: BlobStore) -> None:
    """One cheap round trip to the blob store."""
    with anyio.fail_after(BLOB_SECONDS):
        await anyio.to_thread.run_sync(blobs.probe, abandon_on_cancel=True)


def _say(status: str) -> None:
    systemd.notify(f"STATUS={status}", EXTEND)


async def _extend_start() -> None:
    """Tell the service manager, for as long as it takes, that the start goes on."""
    while True:
        systemd.notify(EXTEND)
        await anyio.sleep(EXTEND_EVERY_SECONDS)
