"""An aiohttp application in a thread and a loop of its own, so that tests of either kind, and other processes, may call it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from aiohttp import web

Answer = TypeVar("Answer")


class Loop:
    """An event loop that runs in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Answer]) -> Answer:
        """The answer of a coroutine that runs there."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(30)

    def call(self, function: Callable[..., object], *arguments: Any) -> None:
        """Call a function there, soon."""
        self.loop.call_soon_threadsafe(function, *arguments)

    def stop(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(10)
        self.loop.close()


@contextmanager
def loop_in_thread() -> Iterator[Loop]:
    loop = Loop()
    try:
        yield loop
    finally:
        loop.stop()


@contextmanager
def served(loop: Loop, make: Callable[[], Awaitable[web.Application]], port: int = 0) -> Iterator[int]:
    """An application on 127.0.0.1 in that loop; gives its port."""

    async def start() -> tuple[web.AppRunner, int]:
        runner = web.AppRunner(await make(), shutdown_timeout=0.1, handler_cancellation=True)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", port)
        await site.start()
        return runner, int(runner.addresses[0][1])

    runner, bound = loop.run(start())
    try:
        yield bound
    finally:
        loop.run(runner.cleanup())
