"""Networks on OpenVINO: the same answers as ONNX Runtime's, refusals in sentences, and no word to anybody else."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from support.checkpoints import engine, exported, needs_torch
from support.photos import photo

from models import ov
from models.base import ImageHWC, Prompt, VisualQuestion
from models.masks import mask_iou
from models.weights import DECODER_FILE, ENCODER_FILE, WeightsError

needs_torch()

ROOT = Path(__file__).parents[2]
needs_openvino = pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino: pip install openvino")


def picture(size_hw: tuple[int, int]) -> ImageHWC:
    return np.random.default_rng(3).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def embedded(runtime: str, size_hw: tuple[int, int]) -> npt.NDArray[np.float32]:
    model = engine(runtime=runtime)
    (embedding,) = model.embed([model.shrink(picture(size_hw))])
    found: npt.NDArray[np.float32] = embedding.data
    return found


def in_python(program: str, folder: Path, *paths: Path) -> subprocess.CompletedProcess[str]:
    """A program in a process whose home is the folder, with those paths before all others."""
    environ = {**os.environ, "HOME": str(folder), "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    return subprocess.run([sys.executable, "-c", program], env=environ, capture_output=True, text=True, check=False)


@needs_openvino
@pytest.mark.parametrize("size_hw", [(192, 256), (401, 600), (600, 401), (31, 500)])
def test_it_answers_as_onnx_runtime_does(size_hw: tuple[int, int]) -> None:
    expected = embedded("onnxruntime", size_hw)
    assert np.abs(embedded("openvino", size_hw) - expected).max() < 1e-3


@needs_openvino
def test_bfloat16_answers_nearly_as_onnx_runtime_does() -> None:
    if not ov.computes_bf16():
        pytest.skip("this CPU does not compute bfloat16")
    expected = embedded("onnxruntime", (192, 256))
    assert np.linalg.norm(embedded("openvino-bf16", (192, 256)) - expected) < 0.02 * np.linalg.norm(expected)


@needs_openvino
def test_a_click_gives_the_same_mask_on_either() -> None:
    masks = []
    for runtime in ("onnxruntime", "openvino"):
        model = engine(runtime=runtime)
        (embedding,) = model.embed([model.shrink(photo("coffee"))])
        (later,) = model.segment([VisualQuestion(embedding, Prompt(points_xy=((280, 150),), labels=(1,)))], lambda: None)
        masks += later()
    assert masks[0].area > 0
    assert mask_iou(*masks) > 0.99


@needs_openvino
def test_ports_are_told_as_onnx_runtime_tells_them() -> None:
    from models import ort

    for name in (ENCODER_FILE, DECODER_FILE):
        theirs, ours = ort.open_graph(exported() / name, 1), ov.open_graph(exported() / name, 1)
        assert ours.inputs == theirs.inputs
        assert [port.name for port in ours.outputs] == [port.name for port in theirs.outputs]


@needs_openvino
def test_a_file_that_is_no_network_is_refused_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"not a network")
    with pytest.raises(WeightsError, match=r"net\.onnx is no network that OpenVINO can open: "):
        ov.open_graph(tmp_path / "net.onnx", 1)


@needs_openvino
def test_it_reports_to_nobody_and_leaves_nothing_in_the_home_folder(tmp_path: Path) -> None:
    """Left to itself, the import of openvino writes an id there and sends an event."""
    opens = f"from pathlib import Path; from models import ov; ov.open_graph(Path({str(exported() / ENCODER_FILE)!r}), 1)"
    done = in_python(f"{opens}; import sys; print(sys.modules['openvino_telemetry'])", tmp_path)
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_an_installation_that_cannot_be_imported_is_told_in_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "openvino").mkdir()
    (tmp_path / "openvino" / "__init__.py").write_text("raise ImportError('libopenvino.so.2640: cannot open shared object file')")
    done = in_python("from models import ov\ntry: ov.computes_bf16()\nexcept Exception as e: print(e)", tmp_path, tmp_path)
    assert done.stdout == (
        "openvino cannot be imported (libopenvino.so.2640: cannot open shared object file); "
        "run: pip install openvino --force-reinstall\n"
    )


def test_on_a_cpu_without_bfloat16_it_is_refused_in_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    if not ov.available():
        pytest.skip("needs openvino: pip install openvino")
    monkeypatch.setattr(ov, "computes_bf16", lambda: False)
    with pytest.raises(WeightsError, match=r"this CPU does not compute bfloat16 .*: take openvino or onnxruntime"):
        ov.open_graph(exported() / ENCODER_FILE, 1, half=True)
