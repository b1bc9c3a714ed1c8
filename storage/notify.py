"""WakeSource: LISTEN on a connection of its own, proven by notifications to itself.

Enters: a DSN. Leaves: calls of `wake` and `proven`. A connection that does not bring its own notification back within the
time-out is replaced, so a half-open socket costs seconds and not for ever.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import asyncpg
import structlog

from storage.base import Task
from storage.postgres import tls, translate

log = structlog.get_logger(__name__)

CHANNEL = "maskd"


class NotifyWake:
    """LISTEN maskd. `probe_seconds` between proofs, each given `timeout_seconds`; back-off up to `backoff_seconds_max`."""

    name = "notify"

    def __init__(
        self,
        dsn: str,
        *,
        probe_seconds: float = 10.0,
        timeout_seconds: float = 5.0,
        backoff_seconds_max: float = 10.0,
        ca_file: str | None = None,
    ) -> None:
        self._dsn = dsn
        self._probe_seconds = probe_seconds
        self._timeout = timeout_seconds
        self._backoff_max = backoff_seconds_max
        self._ca_file = ca_file

    async def run(self, wake: Callable[[], None], proven: Callable[[bool], None]) -> None:
        failures = 0
        while True:
            lived = False

            def now_proven(state: bool) -> None:
                nonlocal lived
                lived = lived or state
                proven(state)

            try:
                await self._epoch(wake, now_proven)
            except (
                OSError,
                TimeoutError,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,
                EOFError,
            ) as error:
                log.warning("wake.lost", source=self.name, reason=str(translate(error)))
            finally:
                proven(False)
            failures = 0 if lived else failures + 1
            await asyncio.sleep(
                random.uniform(0.05, 0.15) if lived else min(self._backoff_max, 0.2 * 2**failures) * random.uniform(0.5, 1)
            )

    def polled(self, tasks: Sequence[Task]) -> None:
        """Nothing: the proof is the round trip, and notifications name no task."""

    async def _epoch(self, wake: Callable[[], None], proven: Callable[[bool], None]) -> None:
        """One connection from LISTEN to its end; raises when it ends."""
        options: dict[str, Any] = {} if self._ca_file is None else {"ssl": tls(self._ca_file)}
        connection = await asyncpg.connect(
            self._dsn,
            timeout=self._timeout,
            command_timeout=self._timeout,
            statement_cache_size=0,
            server_settings={"application_name": "maskd listen"},
            **options,
        )
        try:
            echo, ended = asyncio.Event(), asyncio.Event()
            own_channel = f"maskd_probe_{secrets.token_hex(8)}"
            connection.add_termination_listener(lambda _: ended.set())
            async with asyncio.timeout(self._timeout):
                await connection.add_listener(own_channel, lambda *_: echo.set())
                await connection.add_listener(CHANNEL, lambda *_: wake())
            wake()  # whatever was announced before this LISTEN
            while not ended.is_set():
                echo.clear()
                async with asyncio.timeout(self._timeout):
                    await connection.execute(f"notify {own_channel}")
                    await echo.wait()
                proven(True)
                await self._wait(ended)
            raise ConnectionResetError("the server ended the connection")
        finally:
            connection.terminate()

    async def _wait(self, ended: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(self._probe_seconds):
                await ended.wait()
        except TimeoutError:
            return
