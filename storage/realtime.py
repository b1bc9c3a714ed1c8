"""WakeSource: Supabase Realtime, in epochs. Each has a throw-away client and a topic of its own, and ends on any doubt.

Enters: SUPABASE_URL and a service key. Leaves: calls of `wake` and `proven`. The library's own reconnecting is not used: after
some faults it says that it listens and hears nothing (supabase-py #1134, #1311). What nothing else can notice, a server that
skips changes, is noticed by rows that only the poll found.
"""

from __future__ import annotations

import asyncio
import random
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import anyio
import structlog
from realtime import AsyncRealtimeChannel, AsyncRealtimeClient, RealtimeSubscribeStates
from realtime.types import RealtimePostgresChangesListenEvent as Change

from storage.base import Task, UnavailableError

log = structlog.get_logger(__name__)

TABLE = "segmentation_results"
FILTER = "status=eq.pending"
LISTENS = "Subscribed to PostgreSQL"
"""SUBSCRIBED comes seconds before the server really listens; this message of the server does not."""
AGE_SECONDS_MAX = 23 * 3600.0  # the server ends connections of such keys after 24 hours
CLOSE_SECONDS = 1.0
STEADY_SECONDS = 10.0
MISSED_MAX = 2
ANNOUNCED_MAX = 20_000


class EpochEndedError(Exception):
    """Why an epoch is over."""


class Epoch:
    """What one subscription has come to: `live` once the server listens, over once something is doubtful."""

    def __init__(self) -> None:
        self.live_at: float | None = None
        self.missed = 0
        self.over: str | None = None
        self._states = 0
        self._changed = asyncio.Event()

    def end(self, reason: str) -> None:
        self.over = self.over or reason
        self._changed.set()

    def live(self) -> None:
        self.live_at = self.live_at or time.monotonic()
        self._changed.set()

    def state(self, state: RealtimeSubscribeStates, error: Exception | None) -> None:
        """The channel is to become subscribed, once; whatever else it tells is the end."""
        self._states += 1
        if state != RealtimeSubscribeStates.SUBSCRIBED or self._states > 1:
            self.end(f"the channel is {state.value}" + (f": {error}" if error else ""))

    def task_done(self, task: asyncio.Task[Any]) -> None:
        """A task of the library ended: nothing is heard any more, whatever the client says of itself."""
        error = None if task.cancelled() else task.exception()
        self.end("the connection ended" + (f": {type(error).__name__}" if error else ""))

    async def change(self) -> None:
        """Return when it is live or over."""
        self._changed.clear()
        if self.over is None:
            await self._changed.wait()

    def check(self) -> None:
        """Raise when it is over."""
        if self.over is not None:
            raise EpochEndedError(self.over)


class RealtimeWake:
    """Hears of rows that become pending. `ping_seconds` between proofs that the connection stands; a row that waited longer than
    `deaf_seconds` should have been announced; one that stays silent after it was found deaf is tried for `trial_seconds`."""

    name = "realtime"

    def __init__(
        self,
        url: str,
        key: str,
        *,
        ready_seconds: float = 15.0,
        ping_seconds: float = 10.0,
        timeout_seconds: float = 5.0,
        deaf_seconds: float = 3.0,
        trial_seconds: float = 60.0,
        age_seconds_max: float = AGE_SECONDS_MAX,
        backoff_seconds: float = 0.5,
        backoff_seconds_max: float = 30.0,
    ) -> None:
        self._url = f"{url.rstrip('/')}/realtime/v1"
        self._key = key
        self._ready_seconds = ready_seconds
        self._ping_seconds = ping_seconds
        self._timeout = timeout_seconds
        self._deaf_seconds = deaf_seconds
        self._trial_seconds = trial_seconds
        self._age_max = age_seconds_max
        self._backoff = backoff_seconds
        self._backoff_max = backoff_seconds_max
        self._announced: dict[str, None] = {}
        self._trusted = True
        self._epoch = Epoch()

    async def run(self, wake: Callable[[], None], proven: Callable[[bool], None]) -> None:
        failures = 0
        while True:
            self._epoch = Epoch()
            try:
                await self._listen(self._epoch, wake, proven)
            except Exception as error:  # the world's doing, or the library's: the poll goes on, and so does the next epoch
                reason = str(error) if isinstance(error, EpochEndedError) else f"{type(error).__name__}: {error}"
                log.warning("wake.lost", source=self.name, reason=reason.replace(self._key, "***"))
            finally:
                self._epoch.end("over")
                proven(False)
            lived = self._epoch.live_at is not None and time.monotonic() - self._epoch.live_at > STEADY_SECONDS
            failures = 0 if lived else min(failures + 1, 11)
            await asyncio.sleep(min(self._backoff_max, self._backoff * 2 ** max(0, failures - 1)) * random.uniform(0.5, 1))

    async def prove(self) -> None:
        try:
            await self._listen(Epoch(), lambda: None, lambda _: None, once=True)
        except Exception as error:
            reason = str(error) if isinstance(error, EpochEndedError) else type(error).__name__
            raise UnavailableError(f"Realtime does not tell: {reason}".replace(self._key, "***")) from None

    def polled(self, tasks: Sequence[Task]) -> None:
        """Rows that became pending while we listened, were not announced and have waited long: the server has stopped telling."""
        epoch = self._epoch
        if epoch.live_at is None or epoch.over is not None or not self._trusted:
            return
        listened = time.monotonic() - epoch.live_at
        epoch.missed += sum(
            self._deaf_seconds < task.waited_seconds < listened and task.id not in self._announced for task in tasks
        )
        if epoch.missed >= MISSED_MAX:
            self._trusted = False
            epoch.end("deaf: the poll found rows that were not announced (are grants and publication in order?)")

    async def _listen(self, epoch: Epoch, wake: Callable[[], None], proven: Callable[[bool], None], once: bool = False) -> None:
        """One epoch, from the connection to its end, or until the server listens; raises when it ends."""
        client = AsyncRealtimeClient(
            self._url, self._key, auto_reconnect=False, max_retries=1, timeout=max(1, round(self._ready_seconds))
        )
        channel = client.channel(f"maskd-{secrets.token_hex(8)}")
        self._bind(channel, epoch, wake, proven)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._ready_seconds):
                await client.connect()
                for task in (client._listen_task, client._heartbeat_task):
                    assert task is not None, "a client that is connected listens"
                    task.add_done_callback(epoch.task_done)
                await channel.subscribe(epoch.state)
                while epoch.live_at is None:
                    epoch.check()
                    await epoch.change()
            while not once:
                await self._wait(epoch)
                epoch.check()
                await self._ping(client)
                age = time.monotonic() - begun
                if age > self._age_max or (not self._trusted and age > self._trial_seconds):
                    raise EpochEndedError("it is time for a new one")
        finally:
            await _close(client, channel)

    def _bind(
        self, channel: AsyncRealtimeChannel, epoch: Epoch, wake: Callable[[], None], proven: Callable[[bool], None]
    ) -> None:
        """The callbacks. An exception in one would silence the library for ever: it ends the epoch instead."""

        def guarded(tell: Callable[[Any], None]) -> Callable[[Any], None]:
            def call(payload: Any) -> None:
                try:
                    if epoch.over is None:
                        tell(payload)
                except Exception as error:
                    log.error("wake.callback", source=self.name, exc_info=error)
                    epoch.end(f"a callback failed: {type(error).__name__}")

            return call

        def on_change(payload: Any) -> None:
            self._note((payload["data"].get("record") or {}).get("id"))
            if not self._trusted:
                self._trusted = True
                proven(True)
            wake()

        def on_system(payload: Any) -> None:
            if payload.extension == "postgres_changes" and payload.message == LISTENS:
                epoch.live()
                wake()  # whatever became pending before
                proven(self._trusted)

        channel.on_system(guarded(on_system))
        for change in (Change.Insert, Change.Update):  # an update: a task was promoted, given back or tried again
            channel.on_postgres_changes(
                change, guarded(on_change), table=TABLE, schema="public", filter=FILTER, select=["id"]
            )  # a larger frame would end the connection

    def _note(self, task_id: object) -> None:
        self._announced[str(task_id)] = None
        if len(self._announced) > ANNOUNCED_MAX:
            del self._announced[next(iter(self._announced))]

    async def _wait(self, epoch: Epoch) -> None:
        try:
            async with asyncio.timeout(self._ping_seconds):
                await epoch.change()
        except TimeoutError:
            return

    async def _ping(self, client: AsyncRealtimeClient) -> None:
        """A round trip on the connection; the library would notice a dead one after most of a minute."""
        connection = client._ws_connection
        if connection is None:
            raise EpochEndedError("the connection ended")
        async with asyncio.timeout(self._timeout):
            await (await connection.ping())


async def _close(client: AsyncRealtimeClient, channel: AsyncRealtimeChannel) -> None:
    """Leave nothing of an epoch behind: no task, no timer, no socket."""
    connection, tasks = client._ws_connection, (client._listen_task, client._heartbeat_task)
    channel.rejoin_timer.reset()
    channel.join_push.destroy()
    for task in tasks:
        if task is not None:
            task.cancel()
    with anyio.move_on_after(CLOSE_SECONDS, shield=True):
        await client.close()
    if connection is not None:
        connection.transport.abort()
