"""What a worker tells of itself with each beat, for status and watch: how busy it is, how long things take, how far they are.

Enters: the parts of the flow. Leaves: a few hundred bytes of JSON, bounded, whatever goes on; nobody decides by it. And the other
way round: which kinds the database says are paused.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

import anyio

from daemon import metrics
from daemon.engines import Station
from daemon.gate import AWAY, Gate
from daemon.infer import Pool
from daemon.wake import Wake
from daemon.work import Held
from storage.base import RefusedError, TaskStore

RUNNING_MAX = 8
PAUSED_SECONDS = 5.0
PAUSED_SECONDS_MAX = 2.0
MB = 1024 * 1024


def news(
    held: Held, wake: Wake, gate: Gate, pools: Mapping[str, Pool], gpus: Mapping[str, Any], uptime_seconds: float
) -> dict[str, Any]:
    """All of it, by name."""
    return {
        "uptime_seconds": round(uptime_seconds),
        "wake": wake.mode,
        "failing": sorted(gate.failing),
        "load": {name: _load(pool, held.count(name)) for name, pool in pools.items()},
        "stages": metrics.latencies(),
        "gpus": gpus,
        "running": _running(pools),
    }


class PausedKinds:
    """Which kinds an operator holds back, asked for when somebody wants to know, every few seconds at most."""

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._known: list[str] | None = None
        self._asked_at = -PAUSED_SECONDS

    async def health(self) -> dict[str, Any]:
        """For /health: `paused` is null while the database does not say."""
        if time.monotonic() - self._asked_at >= PAUSED_SECONDS:
            self._asked_at, self._known = time.monotonic(), None
            with anyio.move_on_after(PAUSED_SECONDS_MAX), contextlib.suppress(*AWAY, RefusedError):
                self._known = [str(kind) for kind in await self._store.ask("paused")]
        return {"paused": self._known}


def gpu_memory(stations: Sequence[Station], known: Mapping[str, Mapping[str, int]]) -> dict[str, dict[str, int]]:
    """By device how much of its memory maskd has taken, and how much it may take, of what is known of each station's."""
    return {
        station.device: {"used_mb": known[station.name]["reserved"] // MB, "total_mb": known[station.name]["budget"] // MB}
        for station in stations
        if station.name in known
    }


def _load(pool: Pool, held: int) -> dict[str, int]:
    busy = sum(running.taken for running in pool.running)
    return {"busy": min(busy, pool.slots), "slots": pool.slots, "held": held, "capacity": pool.capacity, "lost": pool.lost}


def _running(pools: Mapping[str, Pool]) -> list[dict[str, Any]]:
    """What runs longest, and how far it is where its handler tells."""
    batches = sorted((running for pool in pools.values() for running in pool.running), key=lambda running: running.started)
    return [
        {
            "id": batch.works[0].task.id,
            "kind": batch.works[0].task.kind,
            "tasks": len(batch.works),
            "share": None if batch.share is None else round(batch.share, 3),
            "seconds": round(time.monotonic() - batch.started, 1),
        }
        for batch in batches[:RUNNING_MAX]
    ]
