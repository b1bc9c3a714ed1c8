"""Writing blobs: a store that hangs is nobody's fault, and holds up nobody for ever."""

from __future__ import annotations

import threading
from typing import Any

import anyio
import pytest
from support.works import a_work

from daemon.keys import Keys
from daemon.write import Writer
from handlers.base import Result, ResultBlob
from storage.base import Fate, Tombstone

pytestmark = pytest.mark.anyio


class Hanging:
    """A blob store whose calls wait until they are let go."""

    def __init__(self) -> None:
        self.go = threading.Event()

    def put(self, key: str, data: bytes, content_type: str) -> None:
        self.go.wait(30)

    def list(self, prefix: str, limit: int) -> list[str]:
        self.go.wait(30)
        return []


async def test_a_put_past_its_time_limit_releases_the_task_and_tells_the_gate() -> None:
    blobs, ended, failing = Hanging(), [], []
    writer = Writer(blobs, Keys(), 4, 1.0, 0.05)  # type: ignore[arg-type]
    writer.end, writer.failing = ended.extend, failing.append
    result: Any = Result((ResultBlob("mask_image_url", "mask.png", "image/png", b"x"),))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            writer.answers(tasks, [a_work()], [result])
    blobs.go.set()
    ((_, outcome),) = ended
    assert (outcome.fate, outcome.wrote) == (Fate.RELEASED, True)
    assert failing


async def test_a_sweep_of_a_store_that_hangs_ends_and_is_tried_again_later() -> None:
    blobs = Hanging()
    writer = Writer(blobs, Keys(), 4, 1.0, 0.05)  # type: ignore[arg-type]
    with anyio.fail_after(20):
        assert not await writer.bury(Tombstone(1, "masks/p/t/"))
    blobs.go.set()
