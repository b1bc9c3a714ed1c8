"""How a task ends, decided as a value; what is written, and what happens when it cannot be."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import anyio
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.works import a_work

from daemon.gate import Gate
from daemon.infer import TimedOutError
from daemon.settle import Settler, encode, end_of
from daemon.spool import Spool
from daemon.work import Held, Work
from handlers.base import RejectedError
from storage.base import (
    Fate,
    InvalidImageError,
    MissingBlobError,
    Outcome,
    RefusedError,
    UnavailableError,
    Verdict,
)

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.parametrize(
    ("error", "fate", "code"),
    [
        (RejectedError("prompt_invalid", "x"), Fate.FAILED, "prompt_invalid"),
        (InvalidImageError("image_too_large", "x"), Fate.FAILED, "image_too_large"),
        (UnavailableError("503"), Fate.RELEASED, None),
        (TimedOutError(), Fate.FAILED, "timeout"),
        (MissingBlobError("k"), Fate.RETRY, "image_missing"),
        (MemoryError(), Fate.RETRY, "out_of_memory"),
        (ZeroDivisionError(), Fate.RETRY, "internal"),
    ],
)
def test_each_error_has_its_fate(error: Exception, fate: Fate, code: str | None) -> None:
    outcome = end_of(a_work(), error, 2.0)
    assert (outcome.fate, outcome.code) == (fate, code)


def test_an_image_that_is_missing_twice_is_missing() -> None:
    assert end_of(a_work(attempts=2), MissingBlobError("k"), 2.0).fate is Fate.FAILED


def test_delays_double_and_are_bounded() -> None:
    delays = [end_of(a_work(attempts=attempt), ValueError(), 2.0).delay_seconds for attempt in (1, 2, 30)]
    assert 1.5 <= delays[0] <= 2.5 < 3 <= delays[1] <= 5
    assert delays[2] <= 300 * 1.25


@given(VALUES)
def test_what_is_written_is_json_that_postgres_takes(value: object) -> None:
    text = encode({"metadata": value})
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "\\u0000" not in text
    json.loads(text)["metadata"].__repr__().encode("utf-8")


class Rows:
    """The part of a store that settles: refuses values with a NUL, is away when told to be."""

    def __init__(self) -> None:
        self.written: list[Outcome] = []
        self.away = 0
        self.lost: set[str] = set()
        self.unending: set[str] = set()
        """Rows that no write ends."""
        self.calls = 0

    async def settle(self, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Verdict]:
        self.calls += 1
        if self.away > 0:
            self.away -= 1
            raise UnavailableError("away")
        if any("BAD" in outcome.values or outcome.id in self.unending for outcome in outcomes):
            raise RefusedError("22P05")
        self.written += [outcome for outcome in outcomes if outcome.id not in self.lost]
        return {(outcome.id, outcome.token): Verdict.LOST for outcome in outcomes if outcome.id in self.lost}

    async def probe(self) -> None:
        return


def settling(rows: Rows, count: int) -> tuple[Settler, Held, list[Work], Gate]:
    held = Held()
    works = [a_work() for _ in range(count)]
    held.add(works)
    gate = Gate({"database": rows.probe})
    return Settler(rows, held, gate, 500, Spool(None, "w", "db", 0, 0)), held, works, gate  # type: ignore[arg-type]


def done(work: Work, values: str = "{}") -> Outcome:
    return Outcome(work.task.id, work.task.token, Fate.DONE, values)


@pytest.mark.anyio
async def test_outcomes_that_came_together_are_written_together() -> None:
    rows = Rows()
    settler, held, works, _ = settling(rows, 10)
    for work in works:
        settler.put([(work, done(work))])
    await settler.flush()
    assert (rows.calls, len(rows.written), len(held)) == (1, 10, 0)


@pytest.mark.anyio
async def test_one_outcome_that_cannot_be_written_ends_alone_as_internal() -> None:
    rows = Rows()
    settler, _, works, _ = settling(rows, 9)
    for number, work in enumerate(works):
        settler.put([(work, done(work, '{"metadata":"BAD"}' if number == 5 else "{}"))])
    await settler.flush()
    ends = {outcome.id: (outcome.fate, outcome.code) for outcome in rows.written}
    assert ends.pop(works[5].task.id) == (Fate.FAILED, "internal")
    assert set(ends.values()) == {(Fate.DONE, None)}


@pytest.mark.anyio
async def test_one_row_that_nothing_can_end_is_let_go_and_stops_nobody() -> None:
    rows = Rows()
    settler, held, works, _ = settling(rows, 3)
    rows.unending = {works[1].task.id}
    settler.put([(work, done(work)) for work in works])
    await settler.flush()
    assert {outcome.id for outcome in rows.written} == {works[0].task.id, works[2].task.id}
    assert len(held) == 0, "the next beat does not name it, so that its row goes back"


@pytest.mark.anyio
async def test_outcomes_wait_while_the_database_is_away() -> None:
    rows = Rows()
    rows.away = 2
    settler, held, works, gate = settling(rows, 3)
    for work in works:
        settler.put([(work, done(work))])
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(gate.run)
            await settler.flush()
            tasks.cancel_scope.cancel()
    assert (len(rows.written), len(held)) == (3, 0)


@pytest.mark.anyio
async def test_only_a_lost_claim_is_told_to_clean_up() -> None:
    rows = Rows()
    settler, _, works, _ = settling(rows, 3)
    rows.lost = {works[1].task.id}
    lost: list[Work] = []
    settler.on_lost = lost.append
    for work in works:
        settler.put([(work, done(work))])
    await settler.flush()
    assert lost == [works[1]]


@pytest.mark.anyio
async def test_only_the_first_end_of_a_work_counts() -> None:
    rows = Rows()
    settler, _, (work,), _ = settling(rows, 1)
    settler.put([(work, Outcome(work.task.id, work.task.token, Fate.FAILED, code="timeout", message="x"))])
    settler.put([(work, done(work))])
    await settler.flush()
    assert [outcome.fate for outcome in rows.written] == [Fate.FAILED]


@pytest.mark.anyio
async def test_of_two_claims_of_one_task_only_the_lost_one_is_cleaned_up() -> None:
    class Replayed(Rows):
        async def settle(self, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Verdict]:
            new, old = outcomes
            return {(new.id, new.token): Verdict.ALREADY, (old.id, old.token): Verdict.LOST}

    settler, held, (new,), _ = settling(Replayed(), 1)
    old = a_work(id=new.task.id)
    held.add([old])
    lost: list[Work] = []
    settler.on_lost = lost.append
    settler.put([(new, done(new)), (old, done(old))])
    await settler.flush()
    assert lost == [old]


@pytest.mark.anyio
async def test_what_is_written_before_an_outage_within_one_batch_does_not_stay_on_disk(tmp_path: Path) -> None:
    """A refused neighbour splits the batch; the half that is written waits for the other, and is kept meanwhile."""

    class HalfAway(Rows):
        stuck = True

        async def settle(self, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Verdict]:
            if self.written and self.stuck:
                raise UnavailableError("away")
            return await super().settle(outcomes)

        async def probe(self) -> None:
            if self.stuck:
                raise UnavailableError("away")

    class Noticed(Spool):
        both, none = anyio.Event(), anyio.Event()

        async def keep(self, outcomes: Sequence[Outcome]) -> None:
            await super().keep(outcomes)
            if len(self) == 2:
                self.both.set()

        def forget(self, claims: Sequence[tuple[str, str]]) -> None:
            super().forget(claims)
            if self.both.is_set() and len(self) == 0:
                self.none.set()

    rows = HalfAway()
    _, held, works, gate = settling(rows, 2)
    spool = Noticed(tmp_path, "w", "db", 100, 1_000_000)
    settler = Settler(rows, held, gate, 500, spool)  # type: ignore[arg-type]
    settler.put([(works[0], done(works[0])), (works[1], done(works[1], '{"x": "BAD"}'))])
    async with anyio.create_task_group() as tasks:
        for loop in (gate.run, settler.run, settler.keep):
            tasks.start_soon(loop)
        with anyio.fail_after(30):
            await spool.both.wait()
            rows.stuck = False
            await held.empty()
            await spool.none.wait()
        tasks.cancel_scope.cancel()
    assert list(tmp_path.iterdir()) == []
