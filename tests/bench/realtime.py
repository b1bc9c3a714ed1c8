"""Realtime: every fault that was seen of it, whether rows are picked up meanwhile, and how long after its end push is live again.

A production daemon with nothing but SUPABASE_URL and a service key, before stand-ins of both services; polls come every few
seconds, so that each fault is told apart from luck.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import asyncpg
import uvloop
from bench.ground import INSERT, KIND, Ground, add_owner
from bench.noop import Noop, worker
from bench.report import Report
from support.front import Front, front
from support.postgrest import SERVICE_KEY
from support.realtime_server import RealtimeServer, supabase

from daemon import metrics
from daemon.main import Daemon

RECOVERY_SECONDS_MAX = 5.0
POLL_SECONDS = 4.0
EVERY_SECONDS = 0.5
GIVE_UP_SECONDS = 25.0


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, for how long, and how it is undone."""

    name: str
    begin: Callable[[Scene], object]
    seconds: float = 0.0
    end: Callable[[Scene], object] = lambda scene: None


@dataclass(slots=True, eq=False)
class Scene:
    """One daemon before its stand-ins."""

    daemon: Daemon
    handler: Noop
    server: RealtimeServer
    front: Front
    sql: asyncpg.Connection[Any]
    project: str
    inserted: int = 0
    ran: int = 0
    slowest: float = 0.0

    @property
    def live(self) -> bool:
        assert self.daemon.pipeline is not None
        return self.daemon.pipeline.parts.wake.mode == "push"

    async def insert(self) -> None:
        """One row; its time to the handler is noted when it is the only one."""
        begun = time.monotonic()
        ran = self.handler.expect(1)
        await self.sql.execute(INSERT, self.project, KIND, None, 1)
        self.inserted += 1
        async with asyncio.timeout(GIVE_UP_SECONDS):
            await ran.wait()
        self.ran += 1
        self.slowest = max(self.slowest, time.monotonic() - begun)

    def hints(self) -> float:
        return float(metrics.WAKES.labels("realtime")._value.get())

    async def until_live(self, joins: int) -> None:
        """Push is proven on a newer subscription than the first `joins`, and a row is announced by it."""
        async with asyncio.timeout(GIVE_UP_SECONDS):
            while True:
                hints = self.hints()
                await self.insert()
                if self.live and self.server.joins > joins and self.hints() > hints:
                    return
                await asyncio.sleep(0.05)


FAULTS = (
    Fault("the token expires", lambda it: it.server.expire()),
    Fault("phx_error", lambda it: it.server.fail()),
    Fault("postgres_changes error, then phx_close", lambda it: (it.server.stumble(), it.server.hang_up())),
    Fault("a frame over 1 MiB", lambda it: it.server.send_too_much()),
    Fault("gone for 2 s", lambda it: it.front.refuse(), 2, lambda it: it.front.clear()),
    Fault("gone for 30 s", lambda it: it.front.refuse(), 30, lambda it: it.front.clear()),
    Fault("a black hole for 20 s", lambda it: it.front.swallow(), 20, lambda it: it.front.clear()),
    Fault("429 at the handshake for 15 s", lambda it: too_many(it.server), 15, lambda it: allow(it.server)),
    Fault("changes are Error 401 for 15 s", lambda it: denied(it.server, True), 15, lambda it: denied(it.server, False)),
    Fault("silence for 15 s", lambda it: silent(it.server, True), 15, lambda it: silent(it.server, False)),
    Fault("an exception in the callback", lambda it: break_callback(it.daemon)),
)


def run(ground: Ground, report: Report) -> None:
    """Each fault for a daemon of its own."""
    report.title("realtime", f"faults of Supabase Realtime; polls every {POLL_SECONDS:g} s while push is proven")
    for fault in FAULTS:
        scene, seconds = uvloop.run(measured(ground.database(), fault))
        report.note(f"{fault.name}: {scene.ran} of {scene.inserted} rows picked up, the slowest after {scene.slowest:.2f} s")
        report.at_most("  seconds until push is live", [seconds], RECOVERY_SECONDS_MAX)


async def measured(dsn: str, fault: Fault) -> tuple[Scene, float]:
    """The scene after the fault, and the seconds from its end until push was live."""
    async with scene_on(dsn) as scene:
        await scene.until_live(0)
        scene.inserted = scene.ran = 0
        scene.slowest = 0.0
        joins = scene.server.joins
        fault.begin(scene)
        until = time.monotonic() + fault.seconds
        while time.monotonic() < until:
            await scene.insert()
            await asyncio.sleep(max(0.0, min(EVERY_SECONDS, until - time.monotonic())))
        fault.end(scene)
        ended = time.monotonic()
        try:
            await scene.until_live(joins)
        except TimeoutError:
            return scene, GIVE_UP_SECONDS
        return scene, time.monotonic() - ended


@asynccontextmanager
async def scene_on(dsn: str) -> AsyncIterator[Scene]:
    handler = Noop()
    with supabase(dsn) as (rpc, server), front("127.0.0.1", int(rpc.url.rpartition(":")[2])) as before:
        settings = {
            "SUPABASE_URL": before.url,
            "SUPABASE_SERVICE_KEY": SERVICE_KEY,
            "MASKD_POLL_SECONDS": str(POLL_SECONDS),
            "MASKD_LOG_LEVEL": "error",
        }
        async with worker("", handler, **settings, seconds_max=120) as daemon:
            sql = await asyncpg.connect(dsn)
            _, project = await add_owner(sql)
            try:
                yield Scene(daemon, handler, server, before, sql, project)
            finally:
                await sql.close()


def too_many(server: RealtimeServer) -> None:
    server.handshake_status = 429
    server.expire()


def allow(server: RealtimeServer) -> None:
    server.handshake_status = None


def denied(server: RealtimeServer, state: bool) -> None:
    server.unauthorized = state


def silent(server: RealtimeServer, state: bool) -> None:
    server.silent = state


def break_callback(daemon: Daemon) -> None:
    """The next hint of Realtime raises where it is taken."""
    assert daemon.pipeline is not None
    wake = daemon.pipeline.parts.wake
    ring = wake.ring

    def fail(source: str = "inside") -> None:
        if source != "realtime":
            ring(source)
            return
        wake.ring = ring  # type: ignore[method-assign]
        raise ValueError("a fault of this benchmark")

    wake.ring = fail  # type: ignore[method-assign]
