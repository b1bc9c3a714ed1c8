"""`maskd` on a host whose clock on the wall is wrong by MASKD_TEST_SKEW seconds, as far as `time` tells it, and whose mock engine
takes its time for everything mode. That the queue asks no clock on the wall at all is a rule of tests/test_tidy.py.

It ends when its standard input does, and on Linux when its parent does though it is stopped, so that no daemon outlives whoever
started it.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from typing import Any

SKEW_VARIABLE = "MASKD_TEST_SKEW"
PR_SET_PDEATHSIG = 1
SLOW_SECONDS = 1.0
"""So that there are always rows in handlers: what is stopped there meets others at the same row when it wakes."""


def shift(seconds: float) -> None:
    """From now on the clock on the wall is wrong; the steady one is not."""
    true_time, true_ns = time.time, time.time_ns
    time.time = lambda: true_time() + seconds
    time.time_ns = lambda: true_ns() + int(seconds * 1e9)


def slow_down() -> None:
    """Everything mode of the mock engine takes so long from now on."""
    from models.mock import Mock

    quick = Mock.everything

    def slow(self: Mock, *words: Any, **more: Any) -> Any:
        threading.Event().wait(SLOW_SECONDS)
        return quick(self, *words, **more)

    Mock.everything = slow  # type: ignore[method-assign]


def end_with_stdin() -> None:
    """Block until nobody holds the other end any more."""
    sys.stdin.buffer.read()
    os._exit(1)


def main() -> None:
    shift(float(os.environ.get(SKEW_VARIABLE, "0")))
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=end_with_stdin, daemon=True).start()
    slow_down()
    from daemon.cli import main as maskd  # what it imports must see the wrong clock

    maskd()


if __name__ == "__main__":
    main()
