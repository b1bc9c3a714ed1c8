"""What the watchdog hears: it starves when the event loop, the claims or a pool stand still, and only then."""

from __future__ import annotations

import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from support.daemons import DaemonProcess, running, wait_until
from support.proxy import tcp_proxy
from support.site import Site
from support.stalling_daemon import PROGRAM, STALL_VARIABLE

pytestmark = pytest.mark.system

PERIOD_SECONDS = 0.3
STALL_SECONDS = 4.0
"""Three leases and two calls, as set below: no part may stand still for longer."""
QUICK = {
    "MASKD_LEASE_SECONDS": "1",
    "MASKD_DATABASE_TIMEOUT_SECONDS": "0.5",
    "MASKD_POLL_SECONDS": "0.2",
    "MASKD_POLL_UNPROVEN_SECONDS": "0.2",
    "WATCHDOG_USEC": str(int(PERIOD_SECONDS * 3e6)),
}


class Manager:
    """The service manager's end of a real datagram socket, listening all the time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pinged_at = time.monotonic()
        self.pings = 0
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(str(path))
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def hears_no_more(self) -> bool:
        return time.monotonic() - self.pinged_at > 5 * PERIOD_SECONDS

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(b"", str(self.path))
        self._thread.join()
        self._channel.close()

    def _listen(self) -> None:
        while line := self._channel.recv(4096):
            if b"WATCHDOG=1" in line:
                self.pinged_at = time.monotonic()
                self.pings += 1


@contextmanager
def watched(
    site: Site, name: str, stall: str = "none", dsn: str | None = None, **settings: str
) -> Iterator[tuple[DaemonProcess, Manager]]:
    manager = Manager(site.folder / f"notify-{name}")
    values = site.settings(dsn, NOTIFY_SOCKET=str(manager.path), **{STALL_VARIABLE: stall}, **QUICK | settings)
    try:
        with running(values, site.folder, PROGRAM) as daemon:
            yield daemon, manager
    finally:
        manager.close()


def test_the_watchdog_starves_when_the_loop_the_claims_or_a_pool_stand_still(site: Site) -> None:
    with ExitStack() as stack:
        parts = {part: stack.enter_context(watched(site, part, part)) for part in ("loop", "claims", "pool")}
        for daemon, manager in parts.values():
            wait_until("it is fed", lambda: manager.pings > 2, 20)  # noqa: B023 - waited for at once
            daemon.send(signal.SIGUSR1)
        wait_until("one that can still claim holds a row", lambda: held(site) > 0, 20)
        for part, (daemon, manager) in parts.items():
            wait_until(f"{part} is silent", manager.hears_no_more, 40)
            stalled = [line["parts"] for line in daemon.events("daemon.stalled")]
            assert stalled[:1] == {"loop": [], "claims": [["claims"]], "pool": [["pool cpu"]]}[part]


def test_the_watchdog_is_fed_while_there_is_nothing_to_do_and_while_the_database_is_away(site: Site) -> None:
    with (
        tcp_proxy(site.database.host, site.database.port) as proxy,
        watched(site, "away", dsn=site.database.through(proxy.port)) as (daemon, away),
        watched(site, "idle") as (_, idle),
        watched(site, "resting", MASKD_REST_SECONDS="0.1", MASKD_POLL_SECONDS="0.6") as (resting_daemon, resting),
    ):
        proxy.swallow()
        enough = int(1.5 * STALL_SECONDS / PERIOD_SECONDS)
        for more in (enough, 3):
            goals = [(manager, manager.pings + more) for manager in (away, idle, resting)]
            wait_until("all are fed", lambda: all(manager.pings > goal for manager, goal in goals), 40)  # noqa: B023 - at once
            proxy.clear()
        assert daemon.events("gate.shut") != []
        assert daemon.events("daemon.stalled") == resting_daemon.events("daemon.stalled") == []


def held(site: Site) -> int:
    """How many rows wait for a thread; there is one more each time, until somebody has claimed one."""
    site.queue.insert("noop")
    return int(site.queue.one("select count(*) from public.segmentation_results where status = 'processing'"))
