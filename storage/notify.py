"""WakeSource: LISTEN on a connection of its own, proven by notifications to itself.

Enters: a DSN. Leaves: calls of `wake` and `proven`. A connection that does not bring its own notification back within the
time-out is replaced, so a half-open socket costs seconds and not for ever.
"""

from __future__ import annotations

import asyncio
import random
import secrets
from collections.abc import Callable, Sequence

import asyncpg
import structlog

from storage.base import ConfigurationError, Task
from storage.postgres import translate
from storage.way import BY_DSN, LISTEN_HINT, Way, connect, is_pooled

log = structlog.get_logger(__name__)

CHANNEL = "maskd"
WORKERS = "select count(*)::integer from maskd.workers where beat_at > clock_timestamp() - lease"
POOLER_SECONDS = 300.0
"""Between tries while a pooler in transaction mode is in between."""


class NoListenError(Exception):
    """A pooler in transaction mode is in between: what one connection hears may be told to another, or to none."""

    def __init__(self) -> None:
        super().__init__(f"a pooler in transaction mode is in between, which cannot LISTEN; {LISTEN_HINT}")


class NotifyWake:
    """LISTEN maskd. `probe_seconds` between proofs, each given `timeout_seconds`; back-off up to `backoff_seconds_max`."""

    name = "notify"
    reasons: tuple[str, ...] = ("connection", "timeout", "refused")

    def __init__(
        self,
        dsn: str,
        *,
        probe_seconds: float = 10.0,
        timeout_seconds: float = 5.0,
        backoff_seconds_max: float = 10.0,
        way: Way = BY_DSN,
    ) -> None:
        self._dsn = dsn
        self._probe_seconds = probe_seconds
        self._timeout = timeout_seconds
        self._backoff_max = backoff_seconds_max
        self._way = way
        self.on_ended: Callable[[str], None] = lambda reason: None
        self.workers = 1

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
                self.on_ended(_reason(error))
            except NoListenError as error:
                log.warning("wake.impossible", source=self.name, reason=str(error))
                self.on_ended("refused")
                await asyncio.sleep(POOLER_SECONDS)
            finally:
                proven(False)
            failures = 0 if lived else failures + 1
            await asyncio.sleep(
                random.uniform(0.05, 0.15) if lived else min(self._backoff_max, 0.2 * 2**failures) * random.uniform(0.5, 1)
            )

    async def prove(self) -> None:
        try:
            await self._epoch(_nothing, _nothing, once=True)
        except NoListenError as error:
            raise ConfigurationError(str(error)) from error
        except Exception as error:
            raise translate(error) from error

    def polled(self, tasks: Sequence[Task]) -> int:
        """None: the proof is the round trip, and notifications name no task."""
        return 0

    async def _epoch(self, wake: Callable[[], None], proven: Callable[[bool], None], once: bool = False) -> None:
        """One connection from LISTEN to its end, or to its first proof; raises when it ends."""
        connection = await self._connect("maskd listen")
        try:
            echo, ended = asyncio.Event(), asyncio.Event()
            own_channel = f"maskd_probe_{secrets.token_hex(8)}"
            connection.add_termination_listener(lambda _: ended.set())
            async with asyncio.timeout(self._timeout):
                await connection.add_listener(own_channel, lambda *_: echo.set())
                await connection.add_listener(CHANNEL, lambda *_: wake())
            if await is_pooled(connection):
                await self._prove_from_outside(own_channel, echo)
            wake()  # whatever was announced before this LISTEN
            while not ended.is_set():
                echo.clear()
                async with asyncio.timeout(self._timeout):
                    if not once:
                        self.workers = max(1, await connection.fetchval(WORKERS))
                    await connection.execute(f"notify {own_channel}")
                    await echo.wait()
                proven(True)
                if once:
                    return
                await self._wait(ended)
            raise ConnectionResetError("the server ended the connection")
        finally:
            connection.terminate()

    async def _prove_from_outside(self, channel: str, echo: asyncio.Event) -> None:
        """Behind a pooler a connection may hear itself by luck: what another one tells must arrive too."""
        other = await self._connect("maskd probe")
        try:
            await other.execute(f"notify {channel}")
        finally:
            other.terminate()
        try:
            async with asyncio.timeout(self._timeout):
                await echo.wait()
        except TimeoutError:
            raise NoListenError from None

    async def _connect(self, name: str) -> asyncpg.Connection:
        return await connect(self._dsn, self._way, name, self._timeout, command_seconds=self._timeout)

    async def _wait(self, ended: asyncio.Event) -> None:
        try:
            async with asyncio.timeout(self._probe_seconds):
                await ended.wait()
        except TimeoutError:
            return


def _nothing(*_: object) -> None:
    """Nobody waits for it."""


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "timeout"
    return "connection" if isinstance(error, (OSError, EOFError, asyncpg.PostgresConnectionError)) else "refused"
