"""The composition root: Config → adapters → Daemon. The same `build()` for production, demo, tests and benchmarks."""

from __future__ import annotations

import gc
import importlib.metadata
import importlib.util
import os
import signal
import socket
import time
import uuid
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import anyio
import structlog

from daemon import doing, metrics, start, systemd
from daemon.claim import Claimer
from daemon.config import Config
from daemon.engines import CPU, Station, describe, kinds_of, memories
from daemon.fetch import Fetcher, FetchLimits
from daemon.gate import Gate
from daemon.infer import Pool
from daemon.journal import Journal
from daemon.keys import Keys, bases_of
from daemon.lanes import Threads
from daemon.lease import Lease
from daemon.news import PausedKinds, gpu_memory, news
from daemon.pipeline import Parts, Pipeline
from daemon.project_images import ProjectImages
from daemon.server import Server
from daemon.session_everything import Everything
from daemon.session_routes import Access, SessionRoutes
from daemon.session_setup import asks_of, desks_of, limits_of
from daemon.sessions import Sessions
from daemon.settle import Settler
from daemon.spool import Spool
from daemon.stalls import Sign, Stalls
from daemon.stores import address, build_sources, build_store
from daemon.vitals import GpuMemory, Vitals
from daemon.wake import Wake
from daemon.work import Held
from daemon.write import Writer
from handlers.base import Handler
from handlers.registry import discover
from models.cache import EmbeddingCache
from storage.base import BlobStore, ConfigurationError, SessionStore
from storage.files import FileBlobs
from storage.memory import MemorySessions
from storage.r2 import R2Blobs

log = structlog.get_logger(__name__)

STALLED_LEASES = 3.0
STALLED_CALLS = 2.0
GPU_BATCHES_MORE = 2
"""Beside the batch on a GPU and the one that is ready: one that is fetched, and one that is drawn and stored."""
MB = 1024 * 1024


class Daemon:
    """One worker: `run()` until `drain()`. `ready` is set once it claims."""

    def __init__(
        self,
        config: Config,
        handlers: Mapping[str, Handler],
        blobs: BlobStore,
        cache: EmbeddingCache,
        session_store: SessionStore,
    ) -> None:
        self.config = config
        self.worker = str(uuid.uuid4())
        self.handlers = handlers
        self.blobs = blobs
        self.cache = cache
        self.stations: list[Station] = []
        self.store = build_store(config)
        key = config.api_secret_key
        access = Access(None if key is None else key.get_secret_value(), config.origins())
        self.sessions = Sessions(session_store, limits_of(config))
        self.everything = Everything(self.sessions)
        routes = SessionRoutes(self.sessions, self.everything, access)
        self.memory = GpuMemory()
        self.vitals = Vitals(self.store, self.memory, config.metrics_seconds)
        self.paused = PausedKinds(self.store)
        self.server = Server(
            config.host,
            config.port,
            access,
            self.health,
            routes,
            with_page=config.page,
            look=self.vitals.look,
            more=self.paused.health,
        )
        self.ready = anyio.Event()
        self.pipeline: Pipeline | None = None
        self.state_dir = config.state_dir.expanduser()
        self._stalls = Stalls()
        self._starting: anyio.CancelScope | None = None
        self.started_at = time.monotonic()

    def drain(self) -> None:
        """Stop in good order; `run` returns when it is done."""
        if self._starting is not None:
            self._starting.cancel()
        systemd.notify("STOPPING=1")
        if self.pipeline is not None:
            self.pipeline.drain()

    async def run(self) -> None:
        """Serve until drained. Raises ConfigurationError, PoolDiedError or what crashed a loop."""
        collect_less_garbage()
        metrics.initialise(sorted(self.handlers), self.cache, version())
        metrics.READY.set_function(self._claims)
        await self.server.start()
        try:
            with anyio.CancelScope() as self._starting:
                # The dead are succeeded while models load: others rescue what they had finished after one lease.
                async with anyio.create_task_group() as starting:
                    starting.start_soon(self._load)
                    templates = await start.open_queue(self.store, self.config, self.state_dir)
                await self.memory.open(memories(self.stations, self.config))
                self.vitals.open()
                await start.try_blobs(self.blobs)
                await start.try_sessions(self.sessions.store)
                journal = Journal(self.state_dir, self.worker, address(self.config))
                self.pipeline = Pipeline(assemble(self, templates, journal))
            if self.pipeline is None:
                return  # told to stop before it began
            if self._starting.cancel_called:
                self.pipeline.drain()
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(systemd.feed_watchdog, self.makes_progress)
                tasks.start_soon(self._say_ready)
                tasks.start_soon(self.memory.run)
                tasks.start_soon(self.sessions.run)
                tasks.start_soon(self.everything.run)
                await self.pipeline.run()
                tasks.cancel_scope.cancel()
            if not len(self.pipeline.parts.held):  # else a successor publishes or takes back what the database never heard of
                journal.close()
        finally:
            with anyio.CancelScope(shield=True):
                await self.server.stop()
                await self.store.close()
                await self.sessions.store.close()

    def makes_progress(self) -> bool:
        """Whether the watchdog may be fed: beats get through, claims go round, pools take what waits for them. An outage is no
        stall: who waits at the gate is excused."""
        if self.pipeline is None:
            return True
        parts = self.pipeline.parts
        failing = parts.gate.failing
        limit = STALLED_LEASES * self.config.lease_seconds + STALLED_CALLS * self.config.database_timeout_seconds
        signs: dict[str, Sign] = {
            "beats": None if "database" in failing else parts.lease.beat_at,
            "claims": None if failing else parts.claimer.sign(),
        }
        signs |= {f"pool {name}": pool.sign() for name, pool in parts.pools.items()}
        limits = {**dict.fromkeys(signs, limit), "claims": limit + parts.wake.seconds_max}
        stalled = self._stalls.look(time.monotonic(), signs, limits)
        if stalled:
            log.error("daemon.stalled", parts=stalled)
        return not stalled

    def health(self) -> dict[str, Any]:
        """What /health tells."""
        body: dict[str, Any] = {
            "status": "starting",
            "version": version(),
            "worker": self.worker,
            "uptime_seconds": round(time.monotonic() - self.started_at, 1),
            "models": describe(self.stations),
            "gpus": self.gpus(),
            "cache": {
                "entries": self.cache.entries,
                "bytes": self.cache.bytes,
                "hits": self.cache.hits,
                "misses": self.cache.misses,
            },
            "sessions": self.sessions.health(),
        }
        if self.pipeline is not None and self.pipeline.ready.is_set():
            parts = self.pipeline.parts
            failing = parts.gate.failing
            body |= {
                "status": "degraded" if failing else "ok",
                "database": "database" not in failing,
                "storage": "blobs" not in failing,
                "wake": parts.wake.mode,
                "in_flight": len(parts.held),
                "pools": {
                    name: {
                        "kinds": pool.kinds,
                        "capacity": pool.capacity,
                        "held": parts.held.count(name),
                        "threads_lost": pool.lost,
                    }
                    for name, pool in parts.pools.items()
                },
            }
        return body

    def _claims(self) -> bool:
        return self.pipeline is not None and self.pipeline.ready.is_set() and not self.pipeline.draining

    def gpus(self) -> dict[str, dict[str, int]]:
        """Memory of the devices, taken and all."""
        return gpu_memory(self.stations, self.memory.known)

    async def _load(self) -> None:
        self.stations = await start.load(self.config, self.cache)

    async def _say_ready(self) -> None:
        assert self.pipeline is not None
        await self.pipeline.ready.wait()
        systemd.notify("READY=1")
        log.info("daemon.ready", worker=self.worker, kinds={name: pool.kinds for name, pool in self.pipeline.parts.pools.items()})
        self.ready.set()
        await doing.tell(self.pipeline)


def build(config: Config, handlers: Mapping[str, Handler] | None = None) -> Daemon:
    """A daemon made of the real adapters; `handlers` replaces the discovered kinds."""
    kinds = wanted_kinds(discover(), config.kinds) if handlers is None else handlers
    cache = EmbeddingCache(config.embedding_cache_mb * MB, config.session_ttl_seconds)
    return Daemon(config, kinds, build_blobs(config), cache, build_session_store(config))


def wanted_kinds(kinds: Mapping[str, Handler], names: str) -> Mapping[str, Handler]:
    """The kinds that this host may serve by its settings. Raises ConfigurationError for a name that is none."""
    if names == "all":
        return kinds
    if unknown := sorted(set(names.split(",")) - set(kinds)):
        raise ConfigurationError(f"MASKD_KINDS: there is no kind {unknown[0]}; there are: {', '.join(sorted(kinds))}")
    return {kind: kinds[kind] for kind in names.split(",")}


def build_blobs(config: Config) -> BlobStore:
    """A local folder when MASKD_BLOB_DIR is set, else R2."""
    if config.blob_dir is not None:
        return FileBlobs(config.blob_dir)
    assert config.r2_endpoint is not None and config.r2_access_key_id is not None and config.r2_secret_access_key is not None
    return R2Blobs(
        config.r2_endpoint,
        config.r2_access_key_id.get_secret_value(),
        config.r2_secret_access_key.get_secret_value(),
        config.r2_bucket,
        connections_max=config.io_threads,
        answered=metrics.blob_answered,
    )


def build_session_store(config: Config) -> SessionStore:
    """In Redis when MASKD_REDIS_URL is set, else in this process."""
    bounds = (config.session_ttl_seconds, config.sessions_max, config.sessions_mb * MB)
    if config.redis_url is None:
        return MemorySessions(*bounds)
    if importlib.util.find_spec("redis") is None:
        raise ConfigurationError("MASKD_REDIS_URL needs redis, which is not installed; run: pip install 'maskd[redis]'")
    from storage.redis import RedisSessions

    return RedisSessions(config.redis_url.get_secret_value(), *bounds)


def build_keys(config: Config) -> Keys:
    """How addresses in rows and keys in the bucket belong together."""
    return Keys(bases_of(config.r2_public_url, config.r2_endpoint, config.r2_bucket), config.r2_public_url)


def assemble(daemon: Daemon, templates: list[str], journal: Journal) -> Parts:
    """The parts of one pipeline."""
    config, store, held = daemon.config, daemon.store, Held()
    wake = Wake(config.poll_seconds, config.poll_unproven_seconds, config.rest_seconds)
    gate = Gate({"database": store.probe, "blobs": partial(start.probe, daemon.blobs)})
    pools = _pools(daemon, journal)
    limits = FetchLimits(
        config.image_bytes_max,
        config.image_pixels_max,
        config.inflight_mb * MB,
        config.io_threads,
        config.threads(),
        config.timeout_seconds,
    )
    keys = build_keys(config)
    project_images = ProjectImages(store, daemon.blobs, keys, templates, config.io_threads, config.timeout_seconds)
    daemon.sessions.open_to(desks_of(daemon.stations, pools), project_images)
    for name in pools:
        metrics.IN_FLIGHT.labels(name).set_function(partial(held.count, name))
        metrics.OUT_OF_MEMORY.labels(name)
        metrics.THREADS_LOST.labels(name).set(0)
    lease = Lease(store, daemon.worker, held, config.lease_seconds, config.unserved_seconds)
    lease.kinds = tuple(sorted({kind for pool in pools.values() for kind in pool.kinds}))
    lease.news = lambda: news(held, wake, gate, pools, daemon.gpus(), time.monotonic() - daemon.started_at)
    kinds = {name: pool.kinds for name, pool in pools.items()}
    lease.may_rest, lease.on_look, wake.on_work = wake.is_idle, wake.look, lease.stir
    spool = Spool(daemon.state_dir, daemon.worker, address(config), config.spool_max, config.spool_mb * MB)
    lease.info = {"host": socket.gethostname(), "pid": os.getpid(), "version": version(), "pools": kinds}
    return Parts(
        worker=daemon.worker,
        store=store,
        held=held,
        wake=wake,
        sources=build_sources(config),
        gate=gate,
        claimer=Claimer(store, daemon.worker, held, wake, gate, config.claim_max),
        fetcher=Fetcher(daemon.blobs, store, keys, templates, limits, asks_of(config)),
        pools=pools,
        writer=Writer(daemon.blobs, keys, config.io_threads, config.retry_seconds, config.timeout_seconds),
        settler=Settler(store, held, gate, config.settle_batch_max, spool),
        lease=lease,
        drain_seconds=config.drain_seconds,
    )


def _pools(daemon: Daemon, journal: Journal) -> dict[str, Pool]:
    """One pool per station that has something to do: a GPU's has one thread of its own, and CPU threads beside it."""
    config, kinds = daemon.config, kinds_of(daemon.stations, daemon.handlers)
    stations = [station for station in daemon.stations if kinds[station.name] or len(daemon.stations) == 1]
    aside = Threads("maskd-aside", config.threads()) if any(station.device != CPU for station in stations) else None
    return {
        station.name: Pool(
            station.name,
            station.models,
            kinds[station.name],
            threads=config.threads() if station.device == CPU else 1,
            prefetch_batches=config.prefetch_batches + (0 if station.device == CPU else GPU_BATCHES_MORE),
            sizes=_sizes(kinds[station.name], station.device, config.batch_max),
            timeout_seconds=config.timeout_seconds * station.patience,
            journal=journal,
            aside=None if station.device == CPU else aside,
            asks_max=config.session_waiting_max,
        )
        for station in stations
    }


def _sizes(kinds: Mapping[str, Handler], device: str, batch_max: int) -> dict[str, int]:
    """The largest batch per kind. Models on a CPU gain nothing by batches: one by one, so that nothing waits here that another
    host could run."""
    return {kind: 1 if device == CPU and handler.ROLES else min(handler.BATCH_MAX, batch_max) for kind, handler in kinds.items()}


def collect_less_garbage() -> None:
    """What is there at the start stays for ever, and tasks are no cycles: look for garbage a hundred times less often."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(70_000, 10, 10)


def version() -> str:
    """The version of the installed distribution, or that of a checkout."""
    try:
        return importlib.metadata.version("maskd")
    except importlib.metadata.PackageNotFoundError:
        return "0+checkout"


async def watch_signals(drain: Callable[[], None]) -> None:
    """The first SIGTERM or SIGINT drains, a second one ends at once."""
    with anyio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
        seen = 0
        async for number in signals:
            seen += 1
            if seen > 1:
                log.warning("signal.second", signal=number.name)
                os._exit(1)
            log.info("signal.drain", signal=number.name)
            drain()
