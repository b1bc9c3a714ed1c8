"""SAM 3's weights in every layout that they come in, and files that must be refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from support.sam3_checkpoints import folder, meta_file, meta_tensors, needs_sam3, one_thread, save_vocabulary, tensors

from models.torch_device import Placement
from models.weights import WeightsError, record, sha256_of

needs_sam3()
import torch  # noqa: E402  the tests are skipped without it
from safetensors.torch import save_file  # noqa: E402

from models.sam3 import Sam3, load  # noqa: E402
from models.sam3_checkpoint import networks, read  # noqa: E402
from models.sam3_layout import from_meta  # noqa: E402

PROJECTION = "detector_model.text_projection.weight"
CLICK = "tracker_model.mask_decoder.iou_prediction_head.proj_out.bias"


@pytest.fixture(scope="module", autouse=True)
def alone() -> Iterator[None]:
    with one_thread():
        yield


def saved(made: Mapping[str, Any], where: Path, name: str = "model.safetensors") -> Path:
    """A folder of the hub with other weights."""
    shutil.copy(folder() / "config.json", where)
    save_vocabulary(where)
    save_file(dict(made), where / name)
    return where


def refusal(path: Path) -> str:
    with pytest.raises(WeightsError) as caught:
        load(path, Placement())
    return str(caught.value)


def made_of(path: Path) -> Mapping[str, Any]:
    """The detector's weights once it is built."""
    state: Mapping[str, Any] = networks(read(path), Placement())[0].state_dict()
    return state


def alike(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_metas_layout_becomes_every_weight_of_the_hubs() -> None:
    made = tensors()
    detector, tracker = from_meta(meta_tensors(made))
    hub = read(folder())
    assert hub.detector.keys() <= detector.keys()
    assert all(torch.equal(values, detector[name]) for name, values in hub.detector.items())
    of_image = [
        name for name in hub.tracker if name.startswith(("mask_decoder.", "prompt_encoder.", "vision_", "no_memory_emb", "sh"))
    ]
    assert len(of_image) > 100
    assert all(torch.equal(hub.tracker[name], tracker[name]) for name in of_image)


def test_both_layouts_make_the_same_networks_and_the_librarys_loader_a_third() -> None:
    from transformers import Sam3Model

    hub, meta = (networks(read(path), Placement()) for path in (folder(), meta_file()))
    assert alike(hub[0].state_dict(), meta[0].state_dict())
    assert hub[1] is not None
    assert meta[1] is not None
    assert alike(hub[1].state_dict(), meta[1].state_dict())
    library = Sam3Model.from_pretrained(folder(), local_files_only=True)
    assert alike(hub[0].state_dict(), library.state_dict())
    assert all(torch.equal(own, its) for own, its in zip(hub[0].buffers(), library.buffers(), strict=True))
    assert hub[0].config._attn_implementation == library.config._attn_implementation == "sdpa"


def test_half_precision_is_for_weights_and_not_for_rotary_positions() -> None:
    detector, tracker = networks(read(folder()), Placement(half=True))
    assert tracker is not None
    assert {values.dtype for values in detector.parameters()} == {torch.bfloat16}
    rotary = detector.vision_encoder.backbone.layers[0].rotary_emb.inv_freq
    assert rotary.dtype == torch.float32
    assert torch.equal(rotary, networks(read(folder()), Placement())[0].vision_encoder.backbone.layers[0].rotary_emb.inv_freq)


def test_the_tracker_has_no_vit_of_its_own() -> None:
    _, tracker = networks(read(folder()), Placement())
    assert tracker is not None
    assert not list(tracker.vision_encoder.backbone.parameters())


def test_without_a_configuration_the_network_is_the_released_one(tmp_path: Path) -> None:
    """Sizes as in Meta's model_builder.py."""
    save_file({"vision_encoder.backbone.x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    held = read(tmp_path / "weights.safetensors")
    vision, text = held.detector_config.vision_config.backbone_config, held.detector_config.text_config
    assert (vision.image_size, vision.patch_size, vision.hidden_size, vision.num_hidden_layers) == (1008, 14, 1024, 32)
    assert (vision.intermediate_size, vision.window_size, vision.global_attn_indexes) == (4736, 24, [7, 15, 23, 31])
    assert (text.hidden_size, text.num_hidden_layers, text.num_attention_heads, text.vocab_size) == (1024, 24, 16, 49408)
    assert text.max_position_embeddings == 32
    decoder = held.detector_config.detr_decoder_config
    assert (decoder.num_queries, decoder.num_layers, decoder.hidden_size, decoder.intermediate_size) == (200, 6, 256, 2048)
    prompts, masks = held.tracker_config.prompt_encoder_config, held.tracker_config.mask_decoder_config
    assert (prompts.image_size, prompts.hidden_size, masks.num_hidden_layers, masks.mlp_dim) == (1008, 256, 2, 2048)


def test_a_single_file_takes_the_configuration_beside_it(tmp_path: Path) -> None:
    saved(tensors(), tmp_path, "renamed.safetensors")
    assert alike(made_of(tmp_path / "renamed.safetensors"), made_of(folder()))


def test_weights_in_several_files_are_read_together(tmp_path: Path) -> None:
    names = list(tensors())
    saved({name: tensors()[name] for name in names[::2]}, tmp_path, "model-1.safetensors")
    saved({name: tensors()[name] for name in names[1::2]}, tmp_path, "model-2.safetensors")
    shards = {name: f"model-{1 + index % 2}.safetensors" for index, name in enumerate(names)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    assert alike(made_of(tmp_path), made_of(folder()))
    assert len(read(tmp_path).checksum) == 64


def test_a_folder_of_the_detector_alone_finds_concepts_only(tmp_path: Path) -> None:
    from transformers import Sam3Model

    Sam3Model.from_pretrained(folder(), local_files_only=True).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "sam3"
    save_vocabulary(tmp_path)
    made: Sam3 = load(tmp_path, Placement())
    assert not made.has_tracker


def test_the_model_is_called_by_its_checksum_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    file = saved(tensors(), tmp_path) / "model.safetensors"
    checksum = sha256_of(file)
    record(file, checksum)
    assert load(tmp_path, Placement()).model_id == f"sam3-{checksum[:8]}"
    record(file, "0" * 64)
    assert refusal(tmp_path).startswith(f"{file} is damaged or not the file that was fetched")


def test_missing_weights_are_refused_and_a_few_named(tmp_path: Path) -> None:
    made = {name: values for name, values in tensors().items() if ".detr_decoder.layers.1." not in name}
    message = refusal(saved(made, tmp_path))
    assert message.startswith(f"{tmp_path / 'model.safetensors'} lacks ")
    assert "detr_decoder.layers.1.self_attn." in message


def test_a_tracker_that_lacks_weights_is_refused(tmp_path: Path) -> None:
    made = {name: values for name, values in tensors().items() if name != CLICK}
    assert "lacks 1 of " in refusal(saved(made, tmp_path))


def test_more_layers_than_the_configuration_says_are_refused(tmp_path: Path) -> None:
    extra = {
        name.replace("layers.1.", "layers.2."): values.clone()
        for name, values in tensors().items()
        if "detr_encoder.layers.1." in name
    }
    assert "has more layers than its configuration says: detr_encoder.layers.2." in refusal(saved(tensors() | extra, tmp_path))


def test_names_that_no_part_of_the_network_has_do_no_harm(tmp_path: Path) -> None:
    made = tensors() | {"detector_model.geometry_encoder.points_pool_project.weight": torch.zeros(2)}
    assert alike(made_of(saved(made, tmp_path)), made_of(folder()))


def test_another_size_than_the_configurations_is_refused(tmp_path: Path) -> None:
    message = refusal(saved(tensors() | {PROJECTION: torch.zeros(32, 16)}, tmp_path))
    assert "text_projection.weight has the shape (32, 16), not (32, 32)" in message


@pytest.mark.parametrize("name", [PROJECTION, CLICK, "detector_model.geometry_encoder.final_proj.weight"])
def test_nan_is_refused_in_whatever_part_it_is(tmp_path: Path, name: str) -> None:
    damaged = tensors()[name].clone()
    damaged.view(-1)[3] = float("nan")
    message = refusal(saved(tensors() | {name: damaged}, tmp_path))
    assert message.startswith(f"{tmp_path / 'model.safetensors'} holds NaN or infinity in {name.split('.', 1)[1]}")


def test_weights_that_are_numbers_but_compute_none_are_refused(tmp_path: Path) -> None:
    name = "detector_model.vision_encoder.backbone.layer_norm.weight"
    message = refusal(saved(tensors() | {name: torch.full_like(tensors()[name], 3e38)}, tmp_path))
    assert message == f"{tmp_path / 'model.safetensors'} computes NaN or infinity: its weights are damaged"


@pytest.mark.parametrize("share", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("whole", [lambda: folder() / "model.safetensors", meta_file], ids=["hub", "meta"])
def test_a_truncated_file_is_refused_by_name(tmp_path: Path, whole: Callable[[], Path], share: float) -> None:
    file = whole()
    data = file.read_bytes()
    (tmp_path / file.name).write_bytes(data[: int(len(data) * share)])
    assert refusal(tmp_path).startswith(f"{tmp_path / file.name} is no file of weights that can be read, or is cut short")


def test_a_file_that_would_run_code_is_not_opened(tmp_path: Path) -> None:
    torch.save({"model": Path("a")}, tmp_path / "sam3.pt")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'sam3.pt'} is no file of weights")


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "sam3.pt")
    assert refusal(tmp_path) == f"{tmp_path / 'sam3.pt'} holds something else than tensors by name"


def test_another_network_is_refused_by_its_names(tmp_path: Path) -> None:
    torch.save({"image_encoder.a": torch.zeros(1)}, tmp_path / "sam3.pt")
    assert refusal(tmp_path) == f"{tmp_path / 'sam3.pt'} holds no SAM 3: its names are like image_encoder.a"


def test_a_configuration_of_another_network_is_refused(tmp_path: Path) -> None:
    saved(tensors(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "sam2"}')
    assert refusal(tmp_path) == f"{tmp_path / 'config.json'} is the configuration of a sam2, not of SAM 3"


def test_a_damaged_configuration_is_refused(tmp_path: Path) -> None:
    saved(tensors(), tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'} is damaged")
    (tmp_path / "config.json").write_text('{"model_type": "sam3", "vision_config": {"fpn_hidden_size": "wide"}}')
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'} is no configuration that can be used")


def test_an_empty_folder_and_a_missing_one_are_told_apart(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"{tmp_path} holds no weights of SAM 3: neither model.safetensors nor sam3.pt"
    assert refusal(tmp_path / "none") == f"there is no {tmp_path / 'none'}"


def test_the_vocabulary_may_lie_elsewhere(tmp_path: Path) -> None:
    weights, words = tmp_path / "weights", tmp_path / "words"
    for place in (weights, words):
        place.mkdir()
    saved(tensors(), weights)
    (weights / "tokenizer.json").rename(words / "tokenizer.json")
    assert f"into {weights}" in refusal(weights)
    assert load(weights, Placement(), vocabulary=words).tokens("cup") == 3
