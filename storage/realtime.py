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
from websockets.exceptions import ConnectionClosed, InvalidMessage

from storage.base import Task, UnavailableError

log = structlog.get_logger(__name__)

TABLE = "segmentation_results"
FILTER = "status=eq.pending"
LISTENS = "Subscribed to PostgreSQL"
"""SUBSCRIBED comes seconds before the server really listens; this message of the server does not."""
AGE_SECONDS_MAX = 23 * 3600.0  # the server ends connections of such keys after 24 hours
CLOSE_SECONDS = 1.0
STEADY_SECONDS = 10.0
HASTE_SECONDS = 300.0
"""For so long after push was lost tries follow one another quickly, so that its return is noticed within seconds."""
UNREADY_PING_SECONDS = 1.0
MISSED_MAX = 2
ANNOUNCED_MAX = 20_000


class EpochEndedError(Exception):
    """Why an epoch is over: one of `RealtimeWake.reasons`, and a sentence."""

    def __init__(self, reason: str, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


class Epoch:
    """What one subscription has come to: `live` once the server listens, over once something is doubtful."""

    def __init__(self) -> None:
        self.live_at: float | None = None
        self.missed = 0
        self.over: EpochEndedError | None = None
        self._states = 0
        self._changed = asyncio.Event()

    def end(self, reason: str, sentence: str) -> None:
        self.over = self.over or EpochEndedError(reason, sentence)
        self._changed.set()

    def live(self) -> None:
        self.live_at = self.live_at or time.monotonic()
        self._changed.set()

    def state(self, state: RealtimeSubscribeStates, error: Exception | None) -> None:
        """The channel is to become subscribed, once; whatever else it tells is the end."""
        self._states += 1
        if state != RealtimeSubscribeStates.SUBSCRIBED or self._states > 1:
            self.end("channel", f"the channel is {state.value}" + (f": {error}" if error else ""))

    def task_done(self, task: asyncio.Task[Any]) -> None:
        """A task of the library ended: nothing is heard any more, whatever the client says of itself."""
        error = None if task.cancelled() else task.exception()
        self.end("connection", "the connection ended" + (f": {type(error).__name__}" if error else ""))

    async def change(self) -> None:
        """Return when it is live or over."""
        self._changed.clear()
        if self.over is None:
            await self._changed.wait()

    def check(self) -> None:
        """Raise when it is over."""
        if self.over is not None:
            raise self.over


class RealtimeWake:
    """Hears of rows that become pending. `ping_seconds` between proofs that the connection stands, each in `timeout_seconds`, as
    is the handshake; a server that does not begin to listen within `ready_seconds` is given up. A row that waited longer than
    `deaf_seconds` should have been announced; one that stays silent after it was found deaf is tried for `trial_seconds`. Tries
    begin up to `backoff_seconds_max` apart while push was lost lately, later up to `backoff_seconds_late`."""

    name = "realtime"
    reasons: tuple[str, ...] = ("refused", "connection", "channel", "timeout", "deaf", "callback", "age")
    workers = 1  # nothing tells here; its hints reach workers at different times anyway

    def __init__(
        self,
        url: str,
        key: str,
        *,
        ready_seconds: float = 15.0,
        ping_seconds: float = 10.0,
        timeout_seconds: float = 4.0,
        deaf_seconds: float = 3.0,
        trial_seconds: float = 60.0,
        age_seconds_max: float = AGE_SECONDS_MAX,
        backoff_seconds: float = 0.5,
        backoff_seconds_max: float = 2.0,
        backoff_seconds_late: float = 30.0,
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
        self._backoff_late = backoff_seconds_late
        self.on_ended: Callable[[str], None] = lambda reason: None
        self._announced: dict[str, None] = {}
        self._trusted = True
        self._epoch = Epoch()

    async def run(self, wake: Callable[[], None], proven: Callable[[bool], None]) -> None:
        failures, lost_at, said = 0, time.monotonic(), ""
        while True:
            epoch = self._epoch = Epoch()
            begun = time.monotonic()
            try:
                await self._listen(epoch, wake, proven)
            except Exception as error:  # the world's doing, or the library's: the poll goes on, and so does the next epoch
                sentence = str(error) if isinstance(error, EpochEndedError) else f"{type(error).__name__}: {error}"
                tell = log.debug if epoch.live_at is None and sentence == said else log.warning  # an outage is told of once
                tell("wake.lost", source=self.name, reason=sentence.replace(self._key, "***"))
                said = sentence
                self.on_ended(_reason(error))
            finally:
                epoch.end("connection", "over")
                proven(False)
            now = time.monotonic()
            if epoch.live_at is not None:
                lost_at = now
                failures = 0 if now - epoch.live_at > STEADY_SECONDS else failures + 1
            else:
                failures += 1
            most = self._backoff_max if now - lost_at < HASTE_SECONDS else self._backoff_late
            pause = min(most, self._backoff * 2 ** min(max(0, failures - 1), 10)) * random.uniform(0.5, 1)
            await asyncio.sleep(pause if epoch.live_at is not None else max(0.0, begun + pause - now))

    async def prove(self) -> None:
        try:
            await self._listen(Epoch(), lambda: None, lambda _: None, once=True)
        except Exception as error:
            reason = str(error) if isinstance(error, EpochEndedError) else type(error).__name__
            raise UnavailableError(f"Realtime does not tell: {reason}".replace(self._key, "***")) from None

    def polled(self, tasks: Sequence[Task]) -> int:
        """Rows that became pending while we listened, were not announced and have waited long: the server has stopped telling."""
        epoch = self._epoch
        if epoch.live_at is None or epoch.over is not None:
            return 0
        listened = time.monotonic() - epoch.live_at
        missed = sum(self._deaf_seconds < task.waited_seconds < listened and task.id not in self._announced for task in tasks)
        epoch.missed += missed
        if epoch.missed >= MISSED_MAX and self._trusted:
            self._trusted = False
            epoch.end("deaf", "deaf: the poll found rows that were not announced (are grants and publication in order?)")
        return missed

    async def _listen(self, epoch: Epoch, wake: Callable[[], None], proven: Callable[[bool], None], once: bool = False) -> None:
        """One epoch, from the connection to its end, or until the server listens; raises when it ends."""
        client = AsyncRealtimeClient(
            self._url, self._key, auto_reconnect=False, max_retries=1, timeout=max(1, round(self._ready_seconds))
        )
        channel = client.channel(f"maskd-{secrets.token_hex(8)}")
        self._bind(channel, epoch, wake, proven)
        begun = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                await client.connect()
            for task in (client._listen_task, client._heartbeat_task):
                assert task is not None, "a client that is connected listens"
                task.add_done_callback(epoch.task_done)
            with anyio.move_on_after(UNREADY_PING_SECONDS):  # it waits for the answer; pings tell sooner when none will come
                await channel.subscribe(epoch.state)
            while not (once and epoch.live_at is not None):
                await self._wait(epoch)
                epoch.check()
                await self._ping(client)
                self._check_age(epoch, time.monotonic() - begun)
        finally:
            await _close(client, channel)

    def _check_age(self, epoch: Epoch, age: float) -> None:
        """Raise when an epoch of this age is to be replaced."""
        if epoch.live_at is None and age > self._ready_seconds:
            raise EpochEndedError("timeout", "the server does not begin to listen")
        if age > self._age_max or (not self._trusted and age > self._trial_seconds):
            raise EpochEndedError("age", "it is time for a new one")

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
                    epoch.end("callback", f"a callback failed: {type(error).__name__}")

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
        seconds = self._ping_seconds if epoch.live_at is not None else min(self._ping_seconds, UNREADY_PING_SECONDS)
        try:
            async with asyncio.timeout(seconds):
                await epoch.change()
        except TimeoutError:
            return

    async def _ping(self, client: AsyncRealtimeClient) -> None:
        """A round trip on the connection; the library would notice a dead one after most of a minute."""
        connection = client._ws_connection
        if connection is None:
            raise EpochEndedError("connection", "the connection ended")
        async with asyncio.timeout(self._timeout):
            await (await connection.ping())


def _reason(error: Exception) -> str:
    """Which of the reasons it is: no answer in time, no connection or one that broke, else what was answered was a refusal."""
    if isinstance(error, EpochEndedError):
        return error.reason
    if isinstance(error, TimeoutError):
        return "timeout"
    return "connection" if isinstance(error, (OSError, EOFError, ConnectionClosed, InvalidMessage)) else "refused"


async def _close(client: AsyncRealtimeClient, channel: AsyncRealtimeChannel) -> None:
    """Leave nothing of an epoch behind: no task, no timer, no socket."""
    connection, tasks = client._ws_connection, (client._listen_task, client._heartbeat_task)
    channel.rejoin_timer.reset()
    for push in (channel.join_push, *channel.messages_waiting_for_ack.values()):
        push.destroy()
    for task in (*tasks, *channel._background_tasks):
        if task is not None:
            task.cancel()
    with anyio.move_on_after(CLOSE_SECONDS, shield=True):
        await client.close()
    if connection is not None:
        connection.transport.abort()
