"""Kinds that take long tell how far they are to whoever gave them their `stop`, and need nobody to listen."""

from __future__ import annotations

import pytest
from support.kinds import job_of, models_of, never_stop

from handlers.base import progress_of
from handlers.registry import discover

KINDS = discover()
WISHES = {
    "fill_object": ("mock", {"boxes": [[70, 10, 480, 385]], "seed": 7, "steps": 4}, "soup"),
    "replace_background": ("mock", {"boxes": [[70, 10, 480, 385]], "seed": 7, "steps": 4}, "a table"),
    "segment_everything": ("mobilesam", {"points_per_side": 4}, None),
}


class Listener:
    """A `stop` that never stops, and hears."""

    def __init__(self) -> None:
        self.shares: list[float] = []

    def __call__(self) -> None:
        return

    def progress(self, share: float) -> None:
        self.shares.append(share)


@pytest.mark.parametrize("kind", WISHES)
def test_a_long_kind_tells_a_share_that_grows(kind: str) -> None:
    engine, params, text = WISHES[kind]
    handler, models, listener = KINDS[kind], models_of(engine), Listener()
    job = job_of(handler, params, text)
    (answer,) = handler.run([handler.prepare(job, models)], models, listener)
    assert not isinstance(answer, Exception)
    assert listener.shares
    assert listener.shares == sorted(listener.shares)
    assert 0 <= listener.shares[0] <= listener.shares[-1] <= 1


def test_a_plain_function_does_as_stop_too() -> None:
    progress_of(never_stop)(0.5)
