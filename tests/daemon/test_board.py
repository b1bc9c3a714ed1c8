"""The board: it fits the terminal whatever there is to show, and what matters most is on it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console
from rich.text import Text

from daemon.board import board

ID = "3b475898-92b1-42e8-aeca-5a4d66dafa30"
SIZES = [(40, 10), (60, 12), (80, 24), (100, 24), (110, 30), (140, 50), (250, 80)]


def worker(number: int, **changes: Any) -> dict[str, Any]:
    info = {
        "host": f"mask-{number}",
        "version": "0.1.0",
        "wake": "push",
        "failing": [],
        "load": {"gpu0": {"busy": 1, "slots": 2, "held": 30, "capacity": 32, "lost": 0}},
        "stages": {"wait": {"p50_ms": 12.0, "p95_ms": 40.0}, "infer": {"p50_ms": 850.0, "p95_ms": 1200.0}},
        "gpus": {"cuda:0": {"used_mb": 9000, "total_mb": 16384}},
        "running": [{"id": ID, "kind": "fill_object", "tasks": 2, "share": 0.4, "seconds": 12.0}],
    }
    kinds = ["fill_object", "segment_concept", "segment_everything"]
    return {"id": ID, "info": info, "kinds": kinds, "silent_seconds": 2.0, "alive": True, **changes}


def status(kinds: int = 9, workers: int = 12, errors: int = 10) -> dict[str, Any]:
    names = [f"segment_everything_{number}" for number in range(kinds)]
    return {
        "tasks": [
            {"kind": name, "status": state, "count": 100_000, "oldest_seconds": 7300.0}
            for name in names
            for state in ("pending", "processing", "delayed", "waiting")
        ],
        "rates": [
            {"kind": name, "done_per_second": 12.5, "failed_per_second": 0.5, "seconds_p50": 1.5, "seconds_p95": 100.0}
            for name in names
        ],
        "kinds": [{"kind": name, "paused": number == 1, "served": number != 2} for number, name in enumerate(names)],
        "workers": [worker(number) for number in range(workers)],
        "errors": [
            {"id": ID, "kind": "segment_visual", "code": "image_missing", "message": "There is none. " * 20, "ago_seconds": 5.0}
            for _ in range(errors)
        ],
    }


def drawn(found: dict[str, Any], width: int, height: int | None = None) -> str:
    console = Console(width=width, height=height, file=io.StringIO(), color_system=None)
    console.print(board(found, width, height, None if height is None else Text("q quits")))
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


@pytest.mark.parametrize(("width", "height"), SIZES)
@pytest.mark.parametrize(("kinds", "workers", "errors"), [(9, 12, 10), (40, 200, 10), (1, 1, 0), (0, 0, 0)])
def test_it_is_as_high_as_the_terminal_and_no_wider(width: int, height: int, kinds: int, workers: int, errors: int) -> None:
    lines = drawn(status(kinds, workers, errors), width, height).splitlines()
    assert len(lines) == height
    assert max(cell_len(line) for line in lines) <= width
    assert lines[-1].startswith("q quits")


@pytest.mark.parametrize("width", [80, 140])
def test_it_tells_what_waits_who_works_and_what_is_wrong(width: int) -> None:
    text = drawn(status(3, 1), width)
    for words in ("100,000+", "paused", "no worker", "2 h", "12", "mask-0", "0.1.0", "gpu0 1/2", "8.8/16 GB", "push", "40%"):
        assert words in text
    for words in ("fill_object", ID[:8] + " +1", "image_missing", "wait", "12/40 ms", "infer", "0.8/1.2 s"):
        assert words in text


def test_a_worker_that_is_silent_cut_off_or_has_lost_threads_is_seen() -> None:
    found = status(1, 0, 0)
    silent, cut_off = worker(0, alive=False, silent_seconds=40.0), worker(1)
    cut_off["info"] |= {"failing": ["blobs"], "load": {"cpu": {"busy": 1, "slots": 2, "held": 1, "capacity": 2, "lost": 1}}}
    text = drawn(found | {"workers": [silent, cut_off]}, 140)
    for words in ("   1 worker", "40 s", "no blobs", "lost 1"):
        assert words in text


def test_beats_of_an_older_version_that_told_less_are_drawn_too() -> None:
    bare = worker(0, info={"host": "old", "pid": 1, "version": "0.0.9", "pools": {"cpu": ["segment_visual"]}})
    assert "0.0.9" in drawn(status(1, 0, 0) | {"workers": [bare], "rates": []}, 80)


HOSTILE = "[/red] [link=x]a[/link] \x1b]0;title\x07\x1b[2J\x9b31m\r\nb\u202e"


@pytest.mark.parametrize(("width", "height"), [(20, 6), *SIZES])
def test_what_others_wrote_is_shown_as_text_and_steers_no_terminal(width: int, height: int) -> None:
    found = status(kinds=2, workers=1, errors=0)
    found["errors"] = [{"id": ID, "kind": HOSTILE, "code": HOSTILE, "message": HOSTILE, "ago_seconds": -5.0}]
    load = {HOSTILE: {"busy": 1, "slots": 2, "held": 30, "capacity": 32, "lost": 1}}
    info = {"host": HOSTILE, "version": HOSTILE, "wake": HOSTILE, "load": load, "failing": [HOSTILE]}
    info["running"] = [{"id": ID, "kind": HOSTILE, "tasks": 2, "share": 0.4, "seconds": -1.0}]
    found["workers"] = [worker(0, info=info, kinds=[HOSTILE], silent_seconds=-3600.0)]
    shown = drawn(found, width, height)
    assert {each for each in shown if not each.isprintable()} == {"\n"}
    assert len(shown.splitlines()) <= height
    assert "-1.0 s" not in shown
    if width >= 140:
        assert "[/red] [link=x]a[/link]" in shown


def test_a_long_name_of_a_kind_leaves_room_for_the_message() -> None:
    found = status(kinds=1, workers=0, errors=0)
    found["errors"] = [
        {"id": ID, "kind": "k" * 500, "code": "kind_unknown", "message": "There is no such kind.", "ago_seconds": 5.0}
    ]
    assert "There is no such kind." in drawn(found, 110)
