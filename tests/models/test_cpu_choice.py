"""Which runtime computes the encoder: the one that was named, else the fastest that agrees, tried once and remembered."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import exported, needs_torch

from models import ort, ov
from models.cpu_choice import AUTO, EXACT, FAST, HALF, MEMORY_FILE, RUNTIMES, Subject, choose
from models.graph import Arrays, Graph, Port
from models.weights import DECODER_FILE, ENCODER_FILE, WeightsError, check

needs_torch()

IMAGE_HWC = np.random.default_rng(5).integers(0, 256, (192, 256, 3)).astype(np.float32)


@dataclass
class Rival:
    """A runtime in small: `runs` of the real one for each of its own, and an answer that is `factor` times the right one."""

    real: Graph
    runs: int
    factor: float
    inputs: tuple[Port, ...] = ()
    outputs: tuple[Port, ...] = ()
    ready: dict[str, list[Any]] = field(default_factory=dict)

    def run(self, wanted: Sequence[str] | None, feeds: Arrays) -> list[Any]:
        for number in range(self.runs):
            self.ready[str(number)] = self.real.run(wanted, feeds)
        return [self.factor * each for each in self.ready["0"]]


def subject(threads: int = 1) -> Subject:
    path = exported() / ENCODER_FILE
    return Subject(path, check(path), threads, lambda graph: {graph.inputs[0].name: IMAGE_HWC})


def rivals(monkeypatch: pytest.MonkeyPatch, fast: Callable[[Graph], Any] | None, half: Callable[[Graph], Any] | None) -> None:
    """In place of OpenVINO's two; None fails to open."""

    def opened(path: Path, threads: int, **settings: bool) -> Any:
        make = half if settings["half"] else fast
        if make is None:
            raise WeightsError("it cannot be opened")
        return make(ort.open_graph(path, threads))

    monkeypatch.setattr(ov, "computes_bf16", lambda: True)
    monkeypatch.setattr(ov, "open_graph", opened)


def instant(factor: float = 1.0) -> Callable[[Graph], Any]:
    """Right, or `factor` times so, and in no time: the answer is ready before it is asked for."""

    def made(real: Graph) -> Any:
        answer = real.run(None, {real.inputs[0].name: IMAGE_HWC})
        return Rival(real, 0, factor, ready={"0": answer})

    return made


def slow(real: Graph) -> Any:
    return Rival(real, 5, 1.0)


def entries(memory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((memory / MEMORY_FILE).read_text())
    return found


def rewrite(memory: Path, **values: Any) -> None:
    (memory / MEMORY_FILE).write_text(json.dumps([{**entry, **values} for entry in entries(memory)]))


def test_the_fastest_that_agrees_is_taken_and_times_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals(monkeypatch, instant(), slow)
    choice = choose(subject())
    assert choice.runtime == FAST
    assert set(choice.measured_ms) == set(RUNTIMES)
    assert choice.measured_ms[FAST] < choice.measured_ms[EXACT]


def test_a_slower_one_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals(monkeypatch, slow, slow)
    assert choose(subject()).runtime == EXACT


def test_float32_is_not_tried_where_bfloat16_is_far_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals(monkeypatch, instant(), instant())
    choice = choose(subject())
    assert (choice.runtime, set(choice.measured_ms)) == (HALF, {EXACT, HALF})


@pytest.mark.parametrize(("off", "taken"), [(1.015, HALF), (1.03, EXACT), (float("nan"), EXACT)])
def test_bfloat16_that_is_more_than_two_percent_off_is_not_offered(
    monkeypatch: pytest.MonkeyPatch, off: float, taken: str
) -> None:
    rivals(monkeypatch, None, instant(off))
    assert choose(subject()).runtime == taken


def test_bfloat16_that_was_named_and_is_too_far_off_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    rivals(monkeypatch, None, instant(1.03))
    with pytest.raises(WeightsError, match=r"in bfloat16 is 3.0% off, more than 2%: take openvino or onnxruntime"):
        choose(subject(), HALF)


def test_a_choice_is_remembered_and_read_back(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rivals(monkeypatch, instant(), slow)
    first = choose(subject(), memory=tmp_path / "state")
    assert [entry["runtime"] for entry in entries(tmp_path / "state")] == [FAST]
    assert os.listdir(tmp_path / "state") == [MEMORY_FILE]
    rivals(monkeypatch, lambda real: real, None)  # measured anew, it would not win
    again = choose(subject(), memory=tmp_path / "state")
    assert (again.runtime, again.measured_ms) == (FAST, first.measured_ms)


def test_other_threads_packages_or_files_are_measured_anew_and_kept_beside(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rivals(monkeypatch, instant(), slow)
    choose(subject(), memory=tmp_path)
    choose(subject(threads=2), memory=tmp_path)
    assert [entry["threads"] for entry in entries(tmp_path)] == [2, 1]
    rewrite(tmp_path, packages={"onnxruntime": "1.0"}, runtime=EXACT)
    assert choose(subject(), memory=tmp_path).runtime == FAST
    assert len(entries(tmp_path)) == 3


def test_a_memory_does_not_grow_without_end(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rivals(monkeypatch, instant(), slow)
    choose(subject(), memory=tmp_path)
    (tmp_path / MEMORY_FILE).write_text(json.dumps([{**entries(tmp_path)[0], "threads": number} for number in range(2, 50)]))
    choose(subject(), memory=tmp_path)
    assert [entry["threads"] for entry in entries(tmp_path)] == [1, *range(2, 17)]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"\xff\xfe", b"7", b"{}", b'[7, null, {}, {"runtime": "sam9"}, {"runtime": "openvino"}]', b"[" * 100_000],
    ids=["empty", "cut off", "no text", "a number", "an object", "other entries", "deep"],
)
def test_a_damaged_memory_is_passed_over_and_made_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, data: bytes) -> None:
    rivals(monkeypatch, instant(), slow)
    (tmp_path / MEMORY_FILE).write_bytes(data)
    assert choose(subject(), memory=tmp_path).runtime == FAST
    assert [entry["runtime"] for entry in entries(tmp_path)] == [FAST]


def test_a_remembered_runtime_that_is_gone_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rivals(monkeypatch, instant(), slow)
    choose(subject(), memory=tmp_path)
    rivals(monkeypatch, None, None)
    assert choose(subject(), memory=tmp_path).runtime == EXACT


def test_a_folder_that_cannot_be_written_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rivals(monkeypatch, instant(), slow)
    (tmp_path / "file").write_bytes(b"")
    assert choose(subject(), memory=tmp_path / "file").runtime == FAST


def test_without_openvino_nothing_is_measured_and_nothing_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    choice = choose(subject(), AUTO, tmp_path)
    assert (choice.runtime, choice.measured_ms, os.listdir(tmp_path)) == (EXACT, {}, [])


@pytest.mark.parametrize("name", [FAST, HALF])
def test_a_named_runtime_that_is_not_installed_is_refused_with_the_command_that_mends_it(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(WeightsError, match=r"^openvino is not installed; run: pip install openvino$"):
        choose(subject(), name)


def test_a_runtime_that_there_is_not_is_answered_with_those_there_are() -> None:
    with pytest.raises(WeightsError, match="there is no runtime tvm; there are: auto, onnxruntime, openvino, openvino-bf16"):
        choose(subject(), "tvm")


def test_the_engine_says_what_computes_it() -> None:
    from models.mobile_sam import load

    files = exported() / ENCODER_FILE, exported() / DECODER_FILE
    assert load(*files, 1, EXACT).runtime == EXACT
    ov_there = ov.available()
    chosen = load(*files, 1)
    assert chosen.runtime in (RUNTIMES if ov_there else (EXACT,))
    assert bool(chosen.measured_ms) == ov_there


@pytest.mark.parametrize("module", [ort, ov], ids=["onnxruntime", "openvino"])
def test_runs_on_many_threads_do_not_mix_their_answers(module: Any) -> None:
    if not module.available():
        pytest.skip("needs openvino: pip install openvino")
    graph = module.open_graph(exported() / ENCODER_FILE, 1)
    feeds = [{graph.inputs[0].name: np.full_like(IMAGE_HWC, level)} for level in (0, 80, 160, 255)] * 4
    alone = [graph.run(None, each)[0] for each in feeds]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: graph.run(None, each)[0], feeds))
    np.testing.assert_array_equal(together, alone)
