"""What the event loop's callbacks complain of: a lost connection is a line in the log, all else ends the process."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from structlog.testing import capture_logs

from daemon.pipeline import Pipeline

pytestmark = pytest.mark.anyio


async def complained(error: Exception | None) -> tuple[Pipeline, list[Any]]:
    pipeline = Pipeline(None)  # type: ignore[arg-type]
    loop = asyncio.get_running_loop()
    before = loop.get_exception_handler()
    pipeline._watch_callbacks()
    try:
        with capture_logs() as lines:
            context = {"message": "Fatal error: protocol.connection_lost() call failed."}
            loop.call_exception_handler(context if error is None else context | {"exception": error})
    finally:
        loop.set_exception_handler(before)
    return pipeline, lines


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), BrokenPipeError("pipe"), ConnectionError("lost")])
async def test_a_lost_connection_is_a_line_in_the_log(error: Exception) -> None:
    pipeline, lines = await complained(error)
    assert [line["event"] for line in lines] == ["loop.connection_lost"]
    assert pipeline._failed is not None
    assert not pipeline._failed.done()


async def test_another_mistake_in_a_callback_is_a_crash() -> None:
    pipeline, _ = await complained(ValueError("inner workings"))
    with pytest.raises(ValueError, match="inner workings"):
        await pipeline._fail_with_callbacks()


async def test_a_complaint_without_an_exception_is_a_line_in_the_log() -> None:
    pipeline, lines = await complained(None)
    assert [line["event"] for line in lines] == ["loop.complaint"]
    assert pipeline._failed is not None
    assert not pipeline._failed.done()
