"""Idle traffic: every byte that a daemon with nothing to do sends and gets, by way of a counting proxy, extrapolated to a day.

Settings are the defaults, but for how soon it rests. The stand-in's replies have as many bytes of headers as those of Supabase's
gateway; what TLS adds is reckoned per record. Bytes of TCP and IP are not counted.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping
from urllib.parse import urlsplit

import uvloop
from bench.ground import Ground
from bench.noop import Noop, worker
from bench.report import Report
from support.front import TLS_RECORD_BYTES, Front, front
from support.postgrest import SERVICE_KEY
from support.realtime_server import supabase

from daemon.main import Daemon

DAY_SECONDS = 86_400.0
MB_A_DAY_MAX = 10.0
REST_SECONDS = 2.0
CALLS = 4
LEGACY_KEY_BYTES = 219
GATEWAY_HEADERS = {
    "cf-ray": "9a1b2c3d4e5f6789-FRA",
    "cf-cache-status": "DYNAMIC",
    "content-profile": "public",
    "content-range": "0-0/*",
    "sb-gateway-version": "1",
    "sb-project-ref": "abcdefghijklmnopqrst",
    "sb-request-id": "01990000-0000-7000-8000-000000000000",
    "strict-transport-security": "max-age=31536000; includeSubDomains; preload",
    "vary": "Accept-Encoding",
    "x-content-type-options": "nosniff",
    "x-envoy-attempt-count": "1",
    "x-envoy-upstream-service-time": "12",
    "set-cookie": f"__cf_bm={'x' * 150}; path=/; expires=Sat, 21-Nov-26 12:00:00 GMT; domain=.supabase.co; HttpOnly; Secure",
    "alt-svc": 'h3=":443"; ma=86400',
}


def run(ground: Ground, report: Report) -> None:
    """Both ways to the queue."""
    report.title(
        "idle", f"bytes of a daemon with nothing to do, over {CALLS} of its calls, as MB a day; at most {MB_A_DAY_MAX:g}"
    )
    dsn = ground.database()
    with supabase(dsn) as (rpc, _), front("127.0.0.1", int(rpc.url.rpartition(":")[2])) as before:
        rpc.faults.headers = GATEWAY_HEADERS
        settings = {"SUPABASE_URL": before.url, "SUPABASE_SERVICE_KEY": SERVICE_KEY}
        counts, seconds = uvloop.run(measured("", before, settings, rpc.calls))
        tell(report, "RPC and Realtime", counts, seconds)
        legacy = 2 * (LEGACY_KEY_BYTES - len(SERVICE_KEY)) * counts["calls"] * DAY_SECONDS / seconds / 1e6
        report.note(f"a legacy service_role token as key adds {legacy:.1f} MB: two headers of each call hold it")
    parts = urlsplit(ground.server.dsn)
    with front("127.0.0.1", parts.port or 5432) as before:
        user = parts.netloc.rpartition("@")[0]
        dsn = f"postgresql://{user}@127.0.0.1:{before.port}/{urlsplit(dsn).path.lstrip('/')}"
        counts, seconds = uvloop.run(measured(dsn, before, {}, {}))
        tell(report, "asyncpg and LISTEN", counts, seconds)


async def measured(dsn: str, before: Front, settings: Mapping[str, str], calls: Mapping[str, int]) -> tuple[Counter[str], float]:
    """What passed between one call of a daemon at rest and the last of `CALLS` more, and the seconds between them."""
    async with worker(dsn, Noop(), **settings, MASKD_REST_SECONDS=str(REST_SECONDS), seconds_max=300) as daemon:
        assert daemon.pipeline is not None
        wake = daemon.pipeline.parts.wake
        while not (wake.is_idle() and wake.mode == "push"):
            await asyncio.sleep(0.1)
        await next_call(daemon)
        await next_call(daemon)
        begun, counted, called = time.monotonic(), before.counts.copy(), sum(calls.values())
        for _ in range(CALLS):
            await next_call(daemon)
        seconds = time.monotonic() - begun
        passed = before.counts - counted
        passed["calls"] = sum(calls.values()) - called
        return passed, seconds


async def next_call(daemon: Daemon) -> None:
    """Return when the daemon has beaten again."""
    assert daemon.pipeline is not None
    lease = daemon.pipeline.parts.lease
    beat_at = lease.beat_at
    while lease.beat_at == beat_at:
        await asyncio.sleep(0.1)
    await asyncio.sleep(0.5)  # and what follows it has passed too


def tell(report: Report, name: str, counts: Counter[str], seconds: float) -> None:
    """The figures of one way, per day."""
    a_day = DAY_SECONDS / seconds / 1e6
    tls = counts["records"] * TLS_RECORD_BYTES
    shares = ", ".join(f"{what} {counts[what] * a_day:.2f}" for what in ("rest", "realtime") if counts[what])
    report.note(f"{name}, {seconds:.0f} s: {shares}, TLS {tls * a_day:.2f}; {counts['connections']} connections made")
    report.at_most("  MB a day", [(counts["rest"] + counts["realtime"] + tls) * a_day], MB_A_DAY_MAX)
