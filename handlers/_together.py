"""A batch in one go, and one job after the other where that fails, so that a bad one never spoils its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from models.base import DeviceLostError, Stop, StoppedError

Prepared = TypeVar("Prepared")


def together(prepared: Sequence[Prepared], answers: Callable[[Sequence[Prepared]], Sequence[Any]], stop: Stop) -> list[Any]:
    """Per prepared job its answer, or the exception that it raised.

    StoppedError and DeviceLostError end them all; MemoryError of more than one job is the pool's to halve.
    """
    if not prepared:
        return []
    stop()
    try:
        return list(answers(prepared))
    except (StoppedError, DeviceLostError):
        raise
    except Exception as error:  # given back as this job's answer; the pool judges it
        if len(prepared) == 1:
            return [error]
        if isinstance(error, MemoryError):
            raise
    return [answer for job in prepared for answer in together([job], answers, stop)]
