"""Every Prometheus series of maskd, by name, in one place. Base units, no ids in labels."""

from __future__ import annotations

import platform
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from prometheus_client import REGISTRY, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, Metric

disable_created_metrics()  # type: ignore[no-untyped-call]  # a series more for each, which nobody asks for
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
CALL_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
LOAD_SECONDS = (0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)

BUILD = Gauge("maskd_build_info", "1; which version runs, on which Python.", ["version", "python"])
READY = Gauge("maskd_ready", "1 once models are loaded and this worker claims, until it is told to stop.")
MODEL_READY = Gauge("maskd_model_ready", "1 for each model that is loaded.", ["pool", "role", "engine", "device"])
LOAD = Histogram("maskd_model_load_seconds", "Time to load one model at the start.", ["engine"], buckets=LOAD_SECONDS)
GPU_MEMORY = Gauge(
    "maskd_gpu_memory_bytes",
    "Memory of a GPU: total, what maskd may use of it (budget), what its tensors take (allocated), what it holds (reserved).",
    ["device", "state"],
)
OUT_OF_MEMORY = Counter("maskd_out_of_memory_total", "Batches that ran out of memory; they are tried again by halves.", ["pool"])

QUEUE = Gauge(
    "maskd_queue_tasks", "Tasks in the queue by kind and status, all workers' (counted to 100,000).", ["kind", "status"]
)
QUEUE_OLDEST = Gauge("maskd_queue_oldest_seconds", "How long the oldest task of a kind has been pending.", ["kind"])
QUEUE_UNSERVED = Gauge(
    "maskd_queue_unserved_tasks", "Pending tasks of a kind that no live worker serves and that is not paused.", ["kind"]
)
QUEUE_PAUSED = Gauge("maskd_queue_paused", "1 while an operator holds a kind back.", ["kind"])
QUEUES = (QUEUE, QUEUE_OLDEST, QUEUE_UNSERVED, QUEUE_PAUSED)
WORKERS = Gauge("maskd_workers_live", "Workers that beat within their lease, by the database's clock.")

CLAIMS = Counter("maskd_claims_total", "Claims asked of the database, by what they brought.", ["result"])
CLAIMED = Counter("maskd_tasks_claimed_total", "Tasks claimed by this worker.", ["kind"])
SETTLED = Counter("maskd_tasks_settled_total", "Tasks settled by this worker, by kind and how they ended.", ["kind", "fate"])
FAILED = Counter("maskd_tasks_failed_total", "Tasks that ended in error, by error code.", ["code"])
LOST = Counter("maskd_claims_lost_total", "Claims that were taken away before they could be settled.")
SPOOLED = Gauge("maskd_outcomes_spooled", "Finished tasks that wait on disk for the database.")
IN_FLIGHT = Gauge("maskd_tasks_in_flight", "Tasks that this worker holds now.", ["pool"])
BEGUN = Gauge("maskd_tasks_begun", "Tasks that run in a handler now.")
WAITED = Histogram(
    "maskd_task_waited_seconds",
    "From pending to claimed: the longest of each claim.",
    ["kind"],
    buckets=SECONDS,
)
STAGE = Histogram(
    "maskd_stage_seconds", "Time of one stage: fetch and write of one task, infer of one batch.", ["stage"], buckets=SECONDS
)
BATCH = Histogram("maskd_batch_tasks", "Tasks in one batch.", ["kind"], buckets=(1, 2, 4, 8, 16, 32, 64, 128))
SETTLE_BATCH = Histogram(
    "maskd_settle_batch_tasks", "Outcomes in one group commit.", buckets=(1, 2, 5, 10, 20, 50, 100, 200, 500)
)
WAKES = Counter(
    "maskd_wakes_total", "Times that this worker was told to look for work, or looked unasked (poll), by source.", ["source"]
)
PUSH_LIVE = Gauge("maskd_push_live", "1 while a push source is proven, from end to end.", ["source"])
MODE = Gauge("maskd_wake_mode", "1 for the way in which this worker learns of work now.", ["mode"])
WAKE_MISSED = Counter("maskd_wake_missed_total", "Rows that a poll found and a push source should have told of.", ["source"])
WAKE_ENDED = Counter(
    "maskd_wake_ended_total", "Subscriptions of a push source, or tries at one, that ended, by why.", ["source", "reason"]
)
GATE = Gauge("maskd_gate_closed", "1 while claims are held back because a shared service fails.", ["service"])
BEATS_FAILED = Counter("maskd_beats_failed_total", "Beats that the database did not take.")
RESCUED = Counter("maskd_tasks_rescued_total", "Tasks of dead workers that this worker took back.")
ORPHANS = Counter("maskd_blobs_orphaned_total", "Blobs of superseded attempts that were deleted.")
BLOB_REQUESTS = Counter(
    "maskd_blob_requests_total",
    "Requests to R2, retries included, by operation and HTTP status; 0 when no answer came.",
    ["operation", "code"],
)
DATABASE = Histogram("maskd_database_seconds", "Time of one call of the queue's functions.", ["call"], buckets=CALL_SECONDS)
DATABASE_FAILED = Counter("maskd_database_failures_total", "Calls of the queue's functions that failed.", ["call"])
THREADS_LOST = Gauge("maskd_threads_lost", "Threads of a pool that hang past their time limit.", ["pool"])
CACHE_BYTES = Gauge("maskd_embedding_cache_bytes", "Bytes of embeddings kept.")

SESSIONS_LIVE = Gauge("maskd_sessions_live", "Sessions in the store now, those of other daemons on it included.")
SESSION_BYTES = Gauge("maskd_session_bytes", "Bytes of sessions in the store.")
SESSIONS_CREATED = Counter("maskd_sessions_created_total", "Sessions created by this daemon.")
SESSION_REQUESTS = Counter("maskd_session_requests_total", "Requests about sessions, by route and status.", ["route", "status"])
SESSION_SECONDS = Histogram(
    "maskd_session_request_seconds", "From a request's headers to its answer, by route.", ["route"], buckets=SECONDS
)

MODES = ("push", "degraded", "poll")
FATES = ("done", "failed", "retry", "released", "suspect")
STAGES = ("fetch", "infer", "write")
SOURCES = ("notify", "realtime", "poll", "look", "slot", "again", "inside")
CODES = (
    "image_missing",
    "image_invalid",
    "image_too_large",
    "image_url_forbidden",
    "prompt_invalid",
    "prompt_language",
    "params_invalid",
    "mask_missing",
    "engine_unavailable",
    "out_of_memory",
    "timeout",
    "poison",
    "internal",
)
"""What a worker may end a task with; the database ends some by itself (after_failed, kind_unknown)."""
OPERATIONS = ("GetObject", "PutObject", "DeleteObjects", "ListObjectsV2")
CALLS = (
    "claim",
    "claim_suspects",
    "settle",
    "beat",
    "rescue",
    "tend",
    "bury",
    "leave",
    "tombstones",
    "bury_tombstones",
    "masks_of",
    "owner_of",
    "key_templates",
    "status",
    "checkup",
    "probe",
)
"""The methods of a TaskStore that ask the database."""
WAITING = ("pending", "processing", "delayed", "waiting")
RECENT_MAX = 500
RECENT_SECONDS = 60.0
RECENT: dict[str, deque[tuple[float, float]]] = {stage: deque(maxlen=RECENT_MAX) for stage in ("wait", *STAGES)}
"""The last times of each stage (when, how long), for what a worker tells of itself; buckets would be too coarse for it."""


def announce_source(source: str, reasons: Sequence[str]) -> None:
    """A push source runs: its label sets exist from now on."""
    WAKES.labels(source)
    WAKE_MISSED.labels(source)
    for reason in reasons:
        WAKE_ENDED.labels(source, reason)


def took(stage: str, seconds: float) -> None:
    """One stage of a task or batch is over."""
    STAGE.labels(stage).observe(seconds)
    RECENT[stage].append((time.monotonic(), seconds))


def waited(kind: str, seconds: float) -> None:
    """A task of that kind was claimed so long after it became pending."""
    WAITED.labels(kind).observe(seconds)
    RECENT["wait"].append((time.monotonic(), seconds))


def latencies() -> dict[str, dict[str, float]]:
    """Per stage the median and the 95th percentile of the last minute, in ms; stages that nothing went through are left out."""
    since, found = time.monotonic() - RECENT_SECONDS, {}
    for stage, times in RECENT.items():
        recent = sorted(seconds for at, seconds in times if at >= since)
        if recent:
            p50, p95 = (recent[min(int(len(recent) * part), len(recent) - 1)] for part in (0.5, 0.95))
            found[stage] = {"p50_ms": round(p50 * 1000, 1), "p95_ms": round(p95 * 1000, 1)}
    return found


class Cache(Protocol):
    """What an embedding cache counts."""

    @property
    def bytes(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...


class _CacheCounts:
    """The embedding cache's own counts, read when scraped."""

    cache: Cache | None = None

    def collect(self) -> Iterator[Metric]:
        hits, misses = (0, 0) if self.cache is None else (self.cache.hits, self.cache.misses)
        yield CounterMetricFamily("maskd_embedding_cache_hits_total", "Embeddings found in the cache.", value=hits)
        yield CounterMetricFamily("maskd_embedding_cache_misses_total", "Embeddings that had to be computed.", value=misses)


CACHE_COUNTS = _CacheCounts()
REGISTRY.register(CACHE_COUNTS)


def set_mode(mode: str) -> None:
    """Exactly one of push, degraded and poll is 1."""
    for each in MODES:
        MODE.labels(each).set(1 if each == mode else 0)


def blob_answered(operation: str, status: int) -> None:
    """R2 answered a request so, or not at all (0). Called from any thread."""
    BLOB_REQUESTS.labels(operation, str(status)).inc()


def show_queue(found: Mapping[str, Any]) -> None:
    """What `TaskStore.status` tells of the queue; kinds and states without a task are 0."""
    paused = {row["kind"]: bool(row["paused"]) for row in found["kinds"]}
    cared_for = {row["kind"] for row in found["kinds"] if row["served"] or row["paused"]}  # what is paused waits for no worker
    for series in QUEUES:
        series.clear()
    for kind in paused:
        QUEUE_PAUSED.labels(kind).set(paused[kind])
        QUEUE_OLDEST.labels(kind).set(0)
        QUEUE_UNSERVED.labels(kind).set(0)
        for status in WAITING:
            QUEUE.labels(kind, status).set(0)
    for row in found["tasks"]:
        QUEUE.labels(row["kind"], row["status"]).set(row["count"])
        if row["status"] == "pending":
            QUEUE_OLDEST.labels(row["kind"]).set(max(0.0, float(row["oldest_seconds"])))
            QUEUE_UNSERVED.labels(row["kind"]).set(0 if row["kind"] in cared_for else row["count"])
    WORKERS.set(sum(bool(worker["alive"]) for worker in found["workers"]))


def hide_queue() -> None:
    """The database did not tell: no figures rather than old ones."""
    for series in QUEUES:
        series.clear()
    WORKERS.set(float("nan"))


def show_memory(known: Mapping[str, Mapping[str, int]]) -> None:
    """The memory of each device by state; a device that does not answer has none."""
    GPU_MEMORY.clear()
    for device, states in known.items():
        for state, count in states.items():
            GPU_MEMORY.labels(device, state).set(count)


def initialise(kinds: Sequence[str], cache: Cache, version: str = "") -> None:
    """Every label set exists from the start, so that a rate over it is never missing; the cache is asked when scraped."""
    BUILD.labels(version, platform.python_version()).set(1)
    set_mode("poll")
    CACHE_BYTES.set_function(lambda: cache.bytes)
    CACHE_COUNTS.cache = cache
    for kind in kinds:
        CLAIMED.labels(kind)
        WAITED.labels(kind)
        BATCH.labels(kind)
        for fate in FATES:
            SETTLED.labels(kind, fate)
    for service in ("database", "blobs"):
        GATE.labels(service).set(0)
    for family, labels in (
        (FAILED, CODES),
        (STAGE, STAGES),
        (WAKES, SOURCES),
        (CLAIMS, ("found", "empty")),
        (DATABASE, CALLS),
        (DATABASE_FAILED, CALLS),
    ):
        for label in labels:
            family.labels(label)
    for operation in OPERATIONS:
        BLOB_REQUESTS.labels(operation, "200")
