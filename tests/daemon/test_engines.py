"""Which engine answers: the one that was named, or the best that is there; what is missing is told with what mends it."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import exported
from support.inpaint_checkpoints import needs_onnx, onnx_file

from daemon.config import Config, load
from daemon.engines import Station, build_stations, describe, kinds_of
from handlers.registry import discover
from models.base import Models
from models.cache import EmbeddingCache
from models.mock import Mock
from models.weights import DECODER_FILE, ENCODER_FILE
from storage.base import ConfigurationError

NOWHERE = Path("/nonexistent/.env")


def config_of(folder: Path, **more: str) -> Config:
    values = {"DATABASE_URL": "postgresql://db/x", "MASKD_BLOB_DIR": "/tmp/blobs", "MASKD_WEIGHTS_DIR": str(folder)}
    return load({**values, "MASKD_CPU_THREADS": "1", **more}, NOWHERE)


def engines(folder: Path, **more: str) -> dict[str, str]:
    found = describe(build_stations(config_of(folder, **more), EmbeddingCache(0)))
    return {role: facts["engine"] for role, facts in found.items()}


def refusal(folder: Path, **more: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        engines(folder, **more)
    return str(caught.value)


def test_without_weights_the_engine_that_needs_none_answers(tmp_path: Path) -> None:
    assert engines(tmp_path) == dict.fromkeys(("visual", "everything", "inpaint"), "classical")


def test_one_file_of_two_is_not_enough(tmp_path: Path) -> None:
    (tmp_path / ENCODER_FILE).write_bytes(b"")
    assert set(engines(tmp_path).values()) == {"classical"}


def test_mobile_sam_is_taken_when_its_files_are_there() -> None:
    assert engines(exported()) == {"visual": "mobilesam", "everything": "mobilesam", "inpaint": "classical"}


def test_both_roles_share_one_engine_and_health_names_it() -> None:
    (station,) = build_stations(config_of(exported(), MASKD_CPU_RUNTIME="onnxruntime"), EmbeddingCache(0))
    assert station.models.visual is station.models.everything
    assert describe([station])["visual"]["model_id"].startswith("mobile-sam-")


def test_a_painter_is_the_best_whose_weights_are_there(tmp_path: Path) -> None:
    needs_onnx()
    (tmp_path / "lama").mkdir()
    shutil.copy(onnx_file(512), tmp_path / "lama" / "lama_fp32.onnx")
    assert engines(tmp_path)["inpaint"] == "lama"
    assert engines(tmp_path, MASKD_INPAINT="classical")["inpaint"] == "classical"
    said = refusal(tmp_path / "nowhere", MASKD_INPAINT="lama")
    assert said.startswith("MASKD_INPAINT=lama: ")
    assert "maskd weights pull lama-onnx" in said


def test_words_become_pictures_only_where_there_is_a_generator(tmp_path: Path) -> None:
    assert "generate" not in engines(tmp_path)
    said = refusal(tmp_path, MASKD_GENERATE="diffusion")
    assert "maskd weights pull diffusion" in said


def test_each_role_can_have_an_engine_of_its_own() -> None:
    named = {"MASKD_VISUAL": "classical", "MASKD_EVERYTHING": "mock"}
    assert engines(exported(), **named) == {"visual": "classical", "everything": "mock", "inpaint": "classical"}


def test_texts_are_answered_where_an_engine_for_them_is_named() -> None:
    assert engines(Path("/nonexistent"), MASKD_CONCEPT="mock")["concept"] == "mock"


def test_kinds_whose_roles_have_no_engine_are_not_claimed(tmp_path: Path) -> None:
    stations = build_stations(config_of(tmp_path), EmbeddingCache(0))
    assert not {"segment_concept", "fill_object"} & set(kinds_of(stations, discover())["cpu"])


def test_a_kind_that_a_gpu_serves_is_left_to_the_gpus() -> None:
    # There is no GPU to load a network on: engines that only say where they are stand in.
    gpu, cpu = Mock(device="cuda:0"), Mock()
    stations = [
        Station("gpu0", "cuda:0", Models(EmbeddingCache(0), visual=cpu, concept=gpu)),
        Station("gpu1", "cuda:1", Models(EmbeddingCache(0), visual=cpu, concept=Mock(device="cuda:1"))),
        Station("cpu", "cpu", Models(EmbeddingCache(0), visual=cpu)),
    ]
    segmenting = {kind: handler for kind, handler in discover().items() if kind.startswith("segment_")}
    claimed = {name: sorted(kinds) for name, kinds in kinds_of(stations, segmenting).items()}
    assert claimed == {"gpu0": ["segment_concept"], "gpu1": ["segment_concept"], "cpu": ["segment_visual"]}
    assert describe(stations)["concept"]["device"] == "cuda:0"


def test_backgrounds_go_where_words_become_pictures() -> None:
    # As above: engines that only say where they are.
    generator = Mock(device="cuda:0")
    stations = [
        Station("gpu0", "cuda:0", Models(EmbeddingCache(0), visual=Mock(), generate=generator)),
        Station("cpu", "cpu", Models(EmbeddingCache(0), visual=Mock())),
    ]
    claimed = {name: set(kinds) for name, kinds in kinds_of(stations, discover()).items()}
    assert claimed["gpu0"] == {"fill_object", "replace_background"}
    assert "replace_background" not in claimed["cpu"]


def test_cuda_without_a_usable_device_ends_the_start_and_names_the_wheel_or_the_driver(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="needs torch")
    if torch.cuda.is_available():
        pytest.skip("there is a usable device here")
    for setting in ("SAM3_DEVICE", "MASKD_DEVICE"):
        said = refusal(tmp_path, **{setting: "cuda"})
        assert said.startswith(f"{setting}=cuda: torch ")
        assert "build without CUDA" in said or "nvidia-smi" in said
        assert said.endswith(f"or set {setting}=cpu")


def test_sam3_without_weights_says_how_to_get_access(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    said = refusal(tmp_path, MASKD_CONCEPT="sam3")
    assert said.startswith("MASKD_CONCEPT=sam3: ")
    assert "https://huggingface.co/facebook/sam3" in said
    assert "HF_TOKEN" in said
    assert "SAM3_WEIGHTS_PATH" in said


def test_a_path_to_weights_that_leads_nowhere_ends_the_start(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    said = refusal(tmp_path, SAM3_WEIGHTS_PATH=str(tmp_path / "nowhere"))
    assert said.startswith("MASKD_CONCEPT=sam3: ")
    assert "nowhere" in said


def test_an_engine_that_was_named_and_lacks_its_weights_ends_the_start(tmp_path: Path) -> None:
    said = refusal(tmp_path, MASKD_VISUAL="mobilesam")
    assert said.startswith("MASKD_VISUAL=mobilesam needs mobile_sam_image_encoder.onnx and sam_mask_decoder_multi.onnx in")
    assert said.endswith("run: maskd weights pull mobile-sam")


def test_an_engine_that_was_named_and_lacks_its_library_ends_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec

    def without(name: str, package: str | None = None) -> Any:
        return None if name == "onnxruntime" else find(name, package)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert "which is not installed; run: pip install onnxruntime" in refusal(tmp_path, MASKD_EVERYTHING="mobilesam")


def test_damaged_weights_are_not_passed_over_in_silence(tmp_path: Path) -> None:
    for name in (ENCODER_FILE, DECODER_FILE, f"{ENCODER_FILE}.sha256"):
        shutil.copy(exported() / name, tmp_path)
    (tmp_path / ENCODER_FILE).write_bytes(b"half")
    said = refusal(tmp_path)
    assert "is damaged or not the file that was fetched" in said
    assert said.endswith("run: maskd weights pull mobile-sam, or set MASKD_VISUAL=classical")


def test_a_name_that_is_no_engine_is_a_mistake_in_the_settings(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="MASKD_VISUAL"):
        config_of(tmp_path, MASKD_VISUAL="sam9")


def test_a_checkpoint_that_knows_no_clicks_leaves_them_to_the_next_engine(tmp_path: Path) -> None:
    pytest.importorskip("torch", reason="needs torch")
    path = detector_only(tmp_path)
    named = {"SAM3_WEIGHTS_PATH": str(path), "MASKD_CONCEPT": "sam3"}
    assert engines(tmp_path, **named)["visual"] == "classical"
    said = refusal(tmp_path, **named, MASKD_VISUAL="sam3")
    assert said == "MASKD_VISUAL=sam3: this checkpoint reads texts only; name another engine"


def detector_only(folder: Path) -> Path:
    """A small SAM 3 without its tracker, as the hub has plain detectors."""
    from safetensors.torch import load_file, save_file
    from support.sam3_checkpoints import folder as sam3

    path = folder / "detector"
    shutil.copytree(sam3(), path)
    kept = {name: values for name, values in load_file(path / "model.safetensors").items() if name.startswith("detector_model.")}
    save_file(kept, path / "model.safetensors", metadata={"format": "pt"})
    return path
