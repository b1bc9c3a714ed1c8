"""The short form of `make chaos`, and proof that its checks see what they are there to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from chaos import checks
from chaos.history import Entry, ends, processing_at, recovered
from chaos.load import BOX, Asked, User
from chaos.machine import play
from chaos.run import run

from storage.files import FileBlobs

USER = User("u", "p", 10)
PENDING, HELD, DONE = ("pending", "processing", "done")


def asked(task: str = "t", **changes: object) -> dict[str, Asked]:
    return {task: Asked(task, USER, "segment_visual", USER.photo, {"boxes": [BOX]}, **changes)}  # type: ignore[arg-type]


def entries(*changes: tuple[float, str]) -> list[Entry]:
    return [Entry(at, status, 1, 0, "token", "worker") for at, status in changes]


def row(**changes: object) -> dict[str, object]:
    key = "masks/p/t/token/"
    urls = {"mask_image_url": f"{key}mask.png", "masks_url": f"{key}masks.json", "result_image_url": None}
    return {"project": "p", "status": DONE, "error": None, "charged": 1, "token": "token", **urls, **changes}


@pytest.mark.system
@pytest.mark.timeout(170)
def test_a_few_faults_lose_nothing_and_do_nothing_twice(tmp_path: Path) -> None:
    lines: list[str] = []
    report = run(tmp_path, seed=8, steps=7, seconds=0, show=lines.append)
    assert report.violations == [], "\n".join(lines)
    assert report.episodes == 1
    assert report.ends["done"] > 10
    assert sum(report.faults.values()) > 2


def test_the_plan_of_a_seed_is_the_same_each_time() -> None:
    plans: list[list[object]] = []

    class Noted:
        """What an episode is asked to do, done by nobody."""

        def __init__(self, *words: object) -> None:
            self.heard: list[object] = [words]
            plans.append(self.heard)

        def __enter__(self) -> Noted:
            return self

        def __exit__(self, *_: object) -> None: ...
        def close(self) -> None: ...

        def __getattr__(self, name: str) -> Any:
            return self if name in ("faults", "load", "dice") else lambda *words: self.heard.append((name, words[-1:]))

    for _ in range(2):
        play(11, 20, Noted)  # type: ignore[arg-type]
    assert str(plans[0]) == str(plans[1])
    assert len({str(heard)[:12] for heard in plans[0]}) > 5, "every episode is a mixture"


def test_a_row_that_never_ended_is_lost_and_one_that_ended_twice_is_a_duplicate() -> None:
    history = {"t": entries((0, PENDING), (1, HELD))}
    assert [each.sentence.split(":")[0] for each in checks.ended_once(asked(), history)] == ["lost"]
    history = {"t": entries((0, PENDING), (1, HELD), (2, DONE), (3, DONE))}
    assert [each.sentence.split(":")[0] for each in checks.ended_once(asked(), history)] == ["duplicate"]
    history = {"t": entries((0, PENDING), (1, HELD), (2, DONE))}
    assert list(checks.ended_once(asked(), history)) == []


def test_an_error_that_nobody_deserved_is_seen_and_one_that_somebody_did_is_not() -> None:
    wrong = {"t": row(status="error", error={"code": "internal"})}
    assert len(list(checks.ended_rightly(asked(), wrong))) == 1
    assert list(checks.ended_rightly(asked(fault="internal"), wrong)) == []
    assert len(list(checks.ended_rightly(asked(fault="internal"), {"t": row()}))) == 2
    assert list(checks.ended_rightly(asked(), {"t": row()})) == []


def test_blobs_that_are_missing_broken_of_another_attempt_or_nobodys_are_seen(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    assert ["does not exist" in each.sentence for each in checks.blobs_of(asked(), {"t": row()}, blobs)] == [True, True]
    blobs.put("masks/p/t/token/mask.png", b"no image", "image/png")
    blobs.put("masks/p/t/token/masks.json", b"{}", "application/json")
    assert ["cannot be read" in each.sentence for each in checks.blobs_of(asked(), {"t": row()}, blobs)] == [True]
    others = list(checks.blobs_of(asked(), {"t": row(token="another")}, blobs))
    assert ["of another attempt" in each.sentence for each in others] == [True, True]
    assert len(list(checks.blobs_of(asked(), {"t": row(masks_url=None)}, blobs))) == 2
    assert [each.task for each in checks.orphans({"t": row(masks_url=None)}, blobs.list("", 10))] == ["t"]


def test_credits_that_vanish_or_come_twice_are_seen() -> None:
    rows = {"t": row()}
    assert list(checks.credits_add_up([USER], rows, {"u": 9}, {"u": 1})) == []
    assert len(list(checks.credits_add_up([USER], rows, {"u": 8}, {"u": 1}))) == 1
    assert len(list(checks.credits_add_up([USER], rows, {"u": 9}, {"u": 2}))) == 1
    assert len(list(checks.credits_add_up([USER], {"t": row(status="error")}, {"u": 9}, {"u": 1}))) == 1


def test_recovery_is_from_the_fault_to_the_end_of_the_last_row_that_was_held() -> None:
    history = {
        "a": entries((0, PENDING), (1, HELD), (5, PENDING), (6, HELD), (7, DONE)),
        "b": entries((0, PENDING), (2, HELD), (4, DONE)),
        "c": entries((0, PENDING), (8, HELD), (9, DONE)),
    }
    assert (processing_at(history, 3), recovered(history, 3)) == (["a", "b"], (4, "a"))
    assert recovered(history, 10) is None
    assert [entry.at for entry in ends(history["a"])] == [7]
