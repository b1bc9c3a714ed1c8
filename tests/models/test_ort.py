"""Sessions of ONNX Runtime: the best provider that really works, as many threads as were asked, none that spins."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from models.ort import open_session
from models.weights import WeightsError

onnxruntime = pytest.importorskip("onnxruntime", reason="it is a dependency of maskd")

ALL = ["CPUExecutionProvider", "DnnlExecutionProvider", "OpenVINOExecutionProvider"]


class Session:
    """A session that runs on one of `WORKING`, else on the CPU without a word, as the library does."""

    WORKING: Sequence[str] = ()
    REFUSING: Sequence[str] = ()

    def __init__(self, path: str, options: Any, providers: Sequence[tuple[str, dict[str, str]]]) -> None:
        (self.asked, self.settings) = providers[0]
        self.options = options
        if self.asked in self.REFUSING:
            raise RuntimeError("no such device")

    def get_providers(self) -> list[str]:
        return [self.asked] if self.asked in self.WORKING else ["CPUExecutionProvider"]


def opened(monkeypatch: pytest.MonkeyPatch, present: list[str], working: Sequence[str], refusing: Sequence[str] = ()) -> Any:
    kind = type("Kind", (Session,), {"WORKING": working, "REFUSING": refusing})
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: present)
    monkeypatch.setattr(onnxruntime, "InferenceSession", kind)
    return open_session(Path("net.onnx"), 3)


@pytest.mark.parametrize(
    ("present", "working", "refusing", "taken"),
    [
        (ALL, ALL, (), "OpenVINOExecutionProvider"),
        (ALL[:2], ALL, (), "DnnlExecutionProvider"),
        (["AzureExecutionProvider", ALL[0]], ALL, (), "CPUExecutionProvider"),
        (ALL, ALL[:2], (), "DnnlExecutionProvider"),
        (ALL, ALL, ALL[1:], "CPUExecutionProvider"),
    ],
    ids=["the best", "the next", "the only one", "one falls back in silence", "two refuse"],
)
def test_the_best_provider_that_works_is_taken(
    monkeypatch: pytest.MonkeyPatch, present: list[str], working: list[str], refusing: list[str], taken: str
) -> None:
    assert opened(monkeypatch, present, working, refusing).asked == taken


def test_threads_are_those_that_were_asked_for_and_do_not_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(monkeypatch, ALL, ALL)
    assert session.options.intra_op_num_threads == 3
    assert session.options.get_session_config_entry("session.intra_op.allow_spinning") == "0"
    assert '"INFERENCE_NUM_THREADS": "3"' in session.settings["load_config"]


def test_a_file_that_is_no_network_is_refused_in_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"not a network")
    with pytest.raises(WeightsError, match=r"net\.onnx is no network that ONNX Runtime can open: "):
        open_session(path, 1)
