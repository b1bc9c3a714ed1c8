"""Who is asked for next when room comes free: no group of kinds keeps another from it."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

from daemon.claim import turns


def order(pools: list[Any], first: dict[str, int]) -> list[tuple[str, str]]:
    return [(pool.name, kinds[0]) for pool, _, kinds in turns(pools, first)]


def pool(name: str, *groups: str) -> Any:
    return SimpleNamespace(name=name, groups=tuple((kind,) for kind in groups))


def test_every_group_of_every_pool_is_asked_for_behind_the_one_that_got_something() -> None:
    pools = [pool("gpu0", "one", "eight"), pool("cpu", "a", "b", "c"), pool("idle")]
    assert order(pools, {}) == [("gpu0", "one"), ("gpu0", "eight"), ("cpu", "a"), ("cpu", "b"), ("cpu", "c")]
    assert order(pools, {"gpu0": 1, "cpu": 3}) == [("gpu0", "eight"), ("gpu0", "one"), ("cpu", "a"), ("cpu", "b"), ("cpu", "c")]


def test_with_room_for_one_at_a_time_groups_alternate_whatever_happens_between() -> None:
    pools, first, got = [pool("gpu0", "one", "eight")], {}, Counter[str]()
    for round_number in range(100):
        if round_number % 2:
            continue  # a round that finds no room asks nobody and moves nothing
        _, place, kinds = next(iter(turns(pools, first)))
        first["gpu0"] = place + 1
        got[kinds[0]] += 1
    assert got == {"one": 25, "eight": 25}
