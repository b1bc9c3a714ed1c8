"""The list of what a worker holds: by claim, so that a task which comes back early is not taken for its old self."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from daemon.work import Held, Work
from storage.base import Task

TASK = Task("task", "first", "kind", "project", None, None, None, "{}", 1, 3, 0, 0.0)


def a_work(token: str) -> Work:
    return Work(replace(TASK, token=token), cast(Any, None), "cpu")


def test_a_task_claimed_anew_before_its_old_claim_has_left_is_counted_twice_and_leaves_twice() -> None:
    held = Held()
    old, new = a_work("first"), a_work("second")
    held.add([old])
    held.add([new])
    assert (len(held), held.count("cpu")) == (2, 2)
    assert (held.find("task", "first"), held.find("task", "second")) == (old, new)
    held.drop([old])
    held.drop([old])
    assert (len(held), held.count("cpu")) == (1, 1)
    held.drop([new])
    assert (len(held), held.count("cpu")) == (0, 0)
