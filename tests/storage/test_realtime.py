"""Realtime fails in every way that was seen of it: rows are picked up meanwhile, and push is live again afterwards."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
from support.postgrest import SERVICE_KEY
from support.proxy import TcpProxy, tcp_proxy
from support.realtime_server import RealtimeServer, realtime

from daemon.wake import Wake
from storage.base import Task
from storage.realtime import RealtimeWake

pytestmark = pytest.mark.anyio

CEILING = 40.0
NEVER = 1000.0
QUICK: dict[str, Any] = {
    "ready_seconds": 3,
    "ping_seconds": 0.2,
    "timeout_seconds": 0.5,
    "deaf_seconds": 0.2,
    "trial_seconds": 0.6,
    "backoff_seconds": 0.1,
    "backoff_seconds_max": 0.5,
}


class Shop:
    """Rows that become pending, and a loop that takes them when `Wake` says so. A row is announced by the stand-in, or is not."""

    def __init__(self, server: RealtimeServer, wake: Wake) -> None:
        self._server = server
        self.wake = wake
        self._waiting: dict[str, float] = {}
        self._changed = anyio.Event()
        self.hints = 0

    def put(self) -> str:
        """A row becomes pending."""
        task_id = str(uuid.uuid4())
        self._waiting[task_id] = time.monotonic()
        self._server.announce(task_id)
        return task_id

    async def until_taken(self, task_id: str) -> None:
        await self.until(lambda: task_id not in self._waiting)

    async def until_push(self) -> None:
        """Push is proven, and a row is taken although nobody polls."""
        await self.until(lambda: self.wake.mode == "push")
        await self.until_taken(self.put())

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(CEILING):
            while not condition():
                with anyio.move_on_after(0.05):
                    await self._changed.wait()

    async def serve(self) -> None:
        while True:
            self.wake.forget()
            now = time.monotonic()
            tasks = [task(task_id, now - since) for task_id, since in self._waiting.items()]
            self._waiting.clear()
            self.wake.found(tasks)
            self._changed.set()
            self._changed = anyio.Event()
            await self.wake.wait(None)


def task(task_id: str, waited_seconds: float) -> Task:
    return Task(task_id, "", "noop", "", None, None, None, "{}", 1, 3, 0, waited_seconds)


@asynccontextmanager
async def shop(
    server: RealtimeServer, url: str | None = None, poll_seconds: float = NEVER, **settings: Any
) -> AsyncIterator[Shop]:
    """A shop whose only source is Realtime; while push is proven it is polled every `poll_seconds`, else five times a second."""
    wake = Wake(poll_seconds, 0.2)
    source = RealtimeWake(url or server.url, SERVICE_KEY, **{**QUICK, **settings})
    opened = Shop(server, wake)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wake.run, source)
        tasks.start_soon(opened.serve)
        await opened.until_push()
        yield opened
        tasks.cancel_scope.cancel()


@pytest.fixture
def server() -> Iterator[RealtimeServer]:
    with realtime() as running:
        yield running


@pytest.fixture
def proxy(server: RealtimeServer) -> Iterator[TcpProxy]:
    """A switch before the stand-in."""
    with tcp_proxy("127.0.0.1", int(server.url.rpartition(":")[2])) as running:
        yield running


async def test_a_row_that_becomes_pending_is_heard_of_and_one_that_ends_is_not(server: RealtimeServer) -> None:
    hints: list[None] = []
    live = anyio.Event()
    source = RealtimeWake(server.url, SERVICE_KEY, **QUICK)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(source.run, lambda: hints.append(None), lambda state: live.set() if state else None)
        with anyio.fail_after(CEILING):
            await live.wait()
        swept = len(hints)
        server.announce("a", "INSERT", "waiting")
        server.announce("b", "UPDATE", "processing")
        server.announce("c", "UPDATE", "pending")
        server.announce("d")
        with anyio.fail_after(CEILING):
            while "d" not in source._announced:
                await anyio.lowlevel.checkpoint()
        tasks.cancel_scope.cancel()
    assert swept == 1, "the sweep after the subscription"
    assert (list(source._announced), len(hints)) == (["c", "d"], 3)


@pytest.mark.parametrize("fault", ["expire", "fail", "stumble", "send_too_much"])
async def test_after_a_fault_of_the_channel_push_is_live_again(server: RealtimeServer, fault: str) -> None:
    async with shop(server) as it:
        for _ in range(2):
            joins = server.joins
            getattr(server, fault)()
            await it.until_taken(it.put())
            await it.until(lambda: server.joins > joins)  # noqa: B023 - waited for at once
            await it.until_push()


async def test_a_server_that_is_gone_for_longer_than_the_library_would_try_comes_back(
    server: RealtimeServer, proxy: TcpProxy
) -> None:
    async with shop(server, f"http://127.0.0.1:{proxy.port}") as it:
        proxy.refuse()
        for _ in range(3):
            await it.until_taken(it.put())
        await it.until(lambda: it.wake.mode == "poll")
        proxy.clear()
        await it.until_push()


async def test_a_connection_that_swallows_everything_is_noticed_and_replaced(server: RealtimeServer, proxy: TcpProxy) -> None:
    async with shop(server, f"http://127.0.0.1:{proxy.port}") as it:
        proxy.swallow()
        await it.until_taken(it.put())
        await it.until(lambda: it.wake.mode == "poll")
        await it.until_taken(it.put())
        proxy.clear()
        await it.until_push()


async def test_too_many_connections_are_waited_out(server: RealtimeServer) -> None:
    async with shop(server) as it:
        server.handshake_status = 429
        server.expire()
        await it.until(lambda: it.wake.mode == "poll")
        await it.until_taken(it.put())
        server.handshake_status = None
        await it.until_push()


async def test_a_subscription_that_never_listens_is_not_taken_for_one_that_does(server: RealtimeServer) -> None:
    async with shop(server, ready_seconds=0.5) as it:
        server.never_ready = True
        server.expire()
        joins = server.joins
        await it.until(lambda: server.joins > joins + 1)
        assert it.wake.mode == "poll"
        await it.until_taken(it.put())
        server.never_ready = False
        await it.until_push()


@pytest.mark.parametrize("fault", ["silent", "unauthorized"])
async def test_a_server_that_does_not_tell_is_found_deaf_and_trusted_again_when_it_tells(
    server: RealtimeServer, fault: str
) -> None:
    async with shop(server, poll_seconds=0.5) as it:
        setattr(server, fault, True)
        await it.until(lambda: it.put() != "" and it.wake.mode == "poll")
        joins = server.joins
        await it.until(lambda: server.joins > joins + 1)
        assert it.wake.mode == "poll", "a subscription alone is no proof any more"
        await it.until_taken(it.put())
        setattr(server, fault, False)
        await it.until(lambda: it.put() != "" and it.wake.mode == "push")


async def test_announced_rows_that_the_poll_finds_first_are_no_sign_of_deafness(server: RealtimeServer) -> None:
    wake = Wake(NEVER, 0.2)
    source = RealtimeWake(server.url, SERVICE_KEY, **QUICK)
    it = Shop(server, wake)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wake.run, source)
        await it.until(lambda: wake.mode == "push")
        for name in ("a", "b", "c"):
            server.announce(name)
        await it.until(lambda: "c" in source._announced)
        source.polled([task(name, 0.3) for name in ("a", "b", "c")])
        source.polled([task(name, NEVER) for name in ("x", "y", "z")])
        assert source._epoch.over is None, "announced, or pending before anybody listened"
        tasks.cancel_scope.cancel()


async def test_an_exception_in_the_callback_ends_the_epoch_and_no_more(server: RealtimeServer) -> None:
    async with shop(server) as it:
        ring, failures = it.wake.ring, 2

        def fail(source: str = "inside") -> None:
            nonlocal failures
            if source == "realtime" and failures:
                failures -= 1
                raise ValueError("a fault of this test")
            ring(source)

        it.wake.ring = fail  # type: ignore[method-assign]
        await it.until_taken(it.put())
        await it.until(lambda: failures == 0)
        await it.until_push()


async def test_an_old_epoch_ends_before_the_server_ends_it(server: RealtimeServer) -> None:
    async with shop(server, age_seconds_max=0.5) as it:
        joins = server.joins
        await it.until(lambda: server.joins >= joins + 2)
        await it.until_taken(it.put())


async def test_nothing_of_an_epoch_is_left_behind_when_it_is_over(server: RealtimeServer) -> None:
    async with shop(server) as it:
        for fault in (server.expire, server.fail, server.stumble):
            joins = server.joins
            fault()
            await it.until(lambda: server.joins > joins)  # noqa: B023 - waited for at once
            await it.until_push()
    await it.until(lambda: not server.channels)
    await it.until(lambda: len(asyncio.all_tasks()) <= 2)
    assert [each.get_name() for each in asyncio.all_tasks() if "realtime" in repr(each.get_coro())] == []


async def test_the_key_is_in_no_line_of_the_log(server: RealtimeServer, capsys: pytest.CaptureFixture[str]) -> None:
    wake = Wake(NEVER, 0.2)
    server.handshake_status = 429
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(wake.run, RealtimeWake(server.url, SERVICE_KEY, **QUICK))
        tasks.start_soon(wake.run, RealtimeWake("http://127.0.0.1:9/a b", SERVICE_KEY, **QUICK))
        with anyio.move_on_after(1.5):
            await anyio.Event().wait()
        tasks.cancel_scope.cancel()
    said = capsys.readouterr()
    assert "wake.lost" in said.out
    assert SERVICE_KEY not in said.out + said.err


async def test_after_a_long_outage_a_try_comes_within_seconds_and_what_went_wrong_is_said_once(
    server: RealtimeServer, proxy: TcpProxy, capsys: pytest.CaptureFixture[str]
) -> None:
    source = RealtimeWake(f"http://127.0.0.1:{proxy.port}", SERVICE_KEY)
    ended: list[str] = []
    enough = anyio.Event()

    def on_ended(reason: str) -> None:
        ended.append(reason)
        if len(ended) == 5:
            enough.set()

    source.on_ended = on_ended
    proxy.refuse()
    live = anyio.Event()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(source.run, lambda: None, lambda state: live.set() if state else None)
        with anyio.fail_after(CEILING):
            await enough.wait()
        proxy.clear()
        begun = time.monotonic()
        with anyio.fail_after(CEILING):
            await live.wait()
        tasks.cancel_scope.cancel()
    assert time.monotonic() - begun < 5
    assert set(ended) == {"connection"}
    assert capsys.readouterr().out.count("wake.lost") == 5, "at debug from the second on, which is not shown in production"


async def test_a_server_that_answers_joins_with_other_bindings_is_left_without_a_trace(server: RealtimeServer) -> None:
    async with shop(server) as it:
        server.other_bindings = True
        server.expire()
        joins = server.joins
        await it.until(lambda: server.joins > joins + 1)
        await it.until_taken(it.put())
        server.other_bindings = False
        await it.until_push()
    await it.until(lambda: len(asyncio.all_tasks()) <= 2)


async def test_a_handshake_that_nobody_answers_is_given_up_in_time(server: RealtimeServer, proxy: TcpProxy) -> None:
    proxy.swallow()
    source, reasons = RealtimeWake(f"http://127.0.0.1:{proxy.port}", SERVICE_KEY, **QUICK), []
    source.on_ended = reasons.append
    with anyio.move_on_after(CEILING):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(source.run, lambda: None, lambda state: None)
            while len(reasons) < 3:
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    assert reasons == ["timeout"] * 3
