"""What systemd wants to hear: ready, what is going on, still making progress, stopping. Silent without NOTIFY_SOCKET."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable

import anyio
import structlog

log = structlog.get_logger(__name__)


def notify(*lines: str) -> None:
    """Send `lines` (READY=1, STATUS=…) to the service manager. One that does not listen is its own affair: it stops no work."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(1.0)
            channel.sendto("\n".join(lines).encode(), address)
    except OSError as error:
        log.warning("systemd.not_heard", lines=lines, reason=str(error))


async def feed_watchdog(alive: Callable[[], bool]) -> None:
    """Ping the watchdog three times per WATCHDOG_USEC while `alive()`; a loop that hangs cannot ping."""
    interval = int(os.environ.get("WATCHDOG_USEC", "0")) / 1e6 / 3
    while interval > 0:
        if alive():
            notify("WATCHDOG=1")
        await anyio.sleep(interval)
