"""Every Prometheus series of maskd, by name, in one place. Base units, no ids in labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

CLAIMED = Counter("maskd_tasks_claimed_total", "Tasks claimed by this worker.", ["kind"])
SETTLED = Counter("maskd_tasks_settled_total", "Tasks settled by this worker, by kind and how they ended.", ["kind", "fate"])
FAILED = Counter("maskd_tasks_failed_total", "Tasks that ended in error, by error code.", ["code"])
LOST = Counter("maskd_claims_lost_total", "Claims that were taken away before they could be settled.")
SPOOLED = Gauge("maskd_outcomes_spooled", "Finished tasks that wait on disk for the database.")
IN_FLIGHT = Gauge("maskd_tasks_in_flight", "Tasks that this worker holds now.")
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
WAKES = Counter("maskd_wakes_total", "Hints that there may be work, by source.", ["source"])
MODE = Gauge("maskd_wake_mode", "1 for the way in which this worker learns of work now.", ["mode"])
WAKE_MISSED = Counter("maskd_wake_missed_total", "Rows that a poll found and a push source should have told of.", ["source"])
WAKE_ENDED = Counter(
    "maskd_wake_ended_total", "Subscriptions of a push source, or tries at one, that ended, by why.", ["source", "reason"]
)
GATE = Gauge("maskd_gate_closed", "1 while claims are held back because a shared service fails.", ["service"])
BEATS_FAILED = Counter("maskd_beats_failed_total", "Beats that the database did not take.")
RESCUED = Counter("maskd_tasks_rescued_total", "Tasks of dead workers that this worker took back.")
ORPHANS = Counter("maskd_blobs_orphaned_total", "Blobs of superseded attempts that were deleted.")
THREADS_LOST = Gauge("maskd_threads_lost", "Threads of a pool that hang past their time limit.", ["pool"])
CACHE_BYTES = Gauge("maskd_embedding_cache_bytes", "Bytes of embeddings kept.")
CACHE_HITS = Gauge("maskd_embedding_cache_hits", "Embeddings found in the cache since the start.")
CACHE_MISSES = Gauge("maskd_embedding_cache_misses", "Embeddings that had to be computed since the start.")

SESSIONS_LIVE = Gauge("maskd_sessions_live", "Sessions in the store now, those of other daemons on it included.")
SESSION_BYTES = Gauge("maskd_session_bytes", "Bytes of sessions in the store.")
SESSIONS_CREATED = Counter("maskd_sessions_created_total", "Sessions created by this daemon.")
SESSION_REQUESTS = Counter("maskd_session_requests_total", "Requests about sessions, by route and status.", ["route", "status"])
SESSION_SECONDS = Histogram(
    "maskd_session_request_seconds", "From a request's headers to its answer, by route.", ["route"], buckets=SECONDS
)

MODES = ("push", "degraded", "poll")


def set_mode(mode: str) -> None:
    """Exactly one of push, degraded and poll is 1."""
    for each in MODES:
        MODE.labels(each).set(1 if each == mode else 0)


def announce_source(source: str, reasons: Sequence[str]) -> None:
    """A push source runs: its label sets exist from now on."""
    WAKES.labels(source)
    WAKE_MISSED.labels(source)
    for reason in reasons:
        WAKE_ENDED.labels(source, reason)


class Cache(Protocol):
    """What an embedding cache counts."""

    @property
    def bytes(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def misses(self) -> int: ...


def initialise(kinds: Sequence[str], cache: Cache) -> None:
    """Every label set exists from the start, so that a rate over it is never missing; the cache is asked when scraped."""
    set_mode("poll")
    CACHE_BYTES.set_function(lambda: cache.bytes)
    CACHE_HITS.set_function(lambda: cache.hits)
    CACHE_MISSES.set_function(lambda: cache.misses)
    for kind in kinds:
        CLAIMED.labels(kind)
        WAITED.labels(kind)
        for fate in ("done", "failed", "retry", "released", "suspect"):
            SETTLED.labels(kind, fate)
    for source in ("inside", "look"):
        WAKES.labels(source)
    for service in ("database", "blobs"):
        GATE.labels(service).set(0)
