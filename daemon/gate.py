"""The claim gate: shut while a service that everybody shares fails, opened again by a probe that succeeds.

Enters: reports of failure. Leaves: the claim loop waits or goes on. So an outage costs no row an attempt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable, Mapping

import anyio
import structlog

from daemon import metrics
from storage.base import ConfigurationError, UnavailableError

log = structlog.get_logger(__name__)

AWAY = (UnavailableError, ConfigurationError)
"""What a shared service raises when it fails. While we run, being refused (a password was changed) is a failure like another:
somebody will mend it, and to end the process would cost the tasks in hand."""
Probe = Callable[[], Awaitable[None]]


class Gate:
    """Open while no service is reported to fail. `probes` names the services and how to try them."""

    def __init__(self, probes: Mapping[str, Probe], probe_seconds: float = 1.0) -> None:
        self._probes = probes
        self._probe_seconds = probe_seconds
        self._failing: set[str] = set()
        self._opened_at: dict[str, float] = {}
        self._refused: dict[str, str] = {}
        self._changed = anyio.Event()

    @property
    def failing(self) -> frozenset[str]:
        """Services that fail now."""
        return frozenset(self._failing)

    def shut(self, service: str, reason: str) -> None:
        """A call to that service failed for a reason that is nobody's fault."""
        if service not in self._failing:
            log.warning("gate.shut", service=service, reason=reason)
            self._failing.add(service)
            metrics.GATE.labels(service).set(1)
            self._change()

    async def opened(self) -> None:
        """Return as soon as nothing fails."""
        while self._failing:
            await self._changed.wait()

    async def opened_for(self, service: str) -> None:
        """Return as soon as that one service does not fail."""
        while service in self._failing:
            await self._changed.wait()

    async def run(self) -> None:
        """Probe what fails until it works again, for ever; no service waits for the probe of another."""
        async with anyio.create_task_group() as tasks:
            for service in self._probes:
                tasks.start_soon(self._watch, service)

    async def _watch(self, service: str) -> None:
        while True:
            while service not in self._failing:
                await self._changed.wait()
            await self._try(service)
            if service in self._failing:
                await anyio.sleep(self._probe_seconds)

    async def _try(self, service: str) -> None:
        if time.monotonic() - self._opened_at.get(service, -math.inf) < self._probe_seconds:
            return  # its probe succeeds and what we want of it does not: no faster than this
        try:
            await self._probes[service]()
        except (UnavailableError, TimeoutError):
            return
        except ConfigurationError as error:
            if self._refused.get(service) != str(error):  # once: it is tried every second until somebody mends it
                self._refused[service] = str(error)
                log.error("gate.refused", service=service, reason=str(error))
            return
        self._refused.pop(service, None)
        log.info("gate.opened", service=service)
        self._failing.discard(service)
        self._opened_at[service] = time.monotonic()
        metrics.GATE.labels(service).set(0)
        self._change()

    def _change(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()
