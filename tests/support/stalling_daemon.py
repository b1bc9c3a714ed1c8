"""`maskd run` whose event loop, claims or pool stands still for ever from SIGUSR1 on; MASKD_TEST_STALL says which of them.

The production `build()` with the kinds made for tests. Start it with `launch(…, program=PROGRAM)`.
"""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from typing import Any

import anyio

from daemon.commands.run import serve, set_up_log
from daemon.config import load
from daemon.main import Daemon, build
from tests.support.kinds_daemon import KINDS

STALL_VARIABLE = "MASKD_TEST_STALL"
PROGRAM = ("-m", "tests.support.stalling_daemon")


def stall(daemon: Daemon) -> None:
    """From now on that part makes no step."""
    assert daemon.pipeline is not None
    match os.environ[STALL_VARIABLE]:
        case "loop":
            threading.Event().wait()
        case "claims":
            daemon.store.claim = never  # type: ignore[method-assign]
        case "pool":  # all its threads hang, and in no batch that would count them as lost
            for _ in range(daemon.config.threads()):
                daemon.pipeline.parts.pools["cpu"]._threads.submit(threading.Event().wait, print)


async def never(*_: Any) -> Any:
    """What a call is like whose time-out does not work."""
    await anyio.sleep_forever()


async def main() -> int:
    config = load()
    set_up_log(config)
    daemon = build(config, KINDS)
    with anyio.open_signal_receiver(signal.SIGUSR1) as signals:
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(partial(stall_at_signal, signals, daemon))
            code = await serve(daemon)
            tasks.cancel_scope.cancel()
    return code


async def stall_at_signal(signals: Any, daemon: Daemon) -> None:
    async for _ in signals:
        stall(daemon)


if __name__ == "__main__":
    os._exit(anyio.run(main))
