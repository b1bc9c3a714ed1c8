"""One job after the other, so that a bad one never spoils its neighbours."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from models.base import Stop, StoppedError

Prepared = TypeVar("Prepared")


def each(prepared: Sequence[Prepared], answer: Callable[[Prepared], Any], stop: Stop) -> list[Any]:
    """Per prepared job its answer, or the exception that it raised; StoppedError ends them all."""
    answers: list[Any] = []
    for job in prepared:
        stop()
        try:
            answers.append(answer(job))
        except StoppedError:
            raise
        except Exception as error:  # given back as this job's answer; the pool judges it
            answers.append(error)
    return answers
