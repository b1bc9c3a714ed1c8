"""A checkpoint of MobileSAM to ONNX: every key used, none missing, and the full size works."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import exported, needs_torch, network, save, small_sizes

from models.weights import DECODER_FILE, ENCODER_FILE, State, WeightsError, state

needs_torch()
import torch  # noqa: E402  the tests are skipped without it

from models.export_mobile_sam import MobileSamNetwork, Sizes, export, load_network  # noqa: E402

KEYS = 439
PARAMETERS = 10_130_092


def test_the_published_checkpoints_keys_and_sizes_are_all_there() -> None:
    with torch.device("meta"):
        net = MobileSamNetwork(Sizes())
    assert len(net.state_dict()) == KEYS
    assert sum(values.numel() for values in net.parameters()) == PARAMETERS
    shapes = {key: tuple(values.shape) for key, values in net.state_dict().items()}
    expected = {
        "image_encoder.patch_embed.seq.0.c.weight": (32, 3, 3, 3),
        "image_encoder.layers.1.blocks.0.attn.attention_biases": (4, 49),
        "image_encoder.layers.2.blocks.5.attn.attention_biases": (5, 196),
        "image_encoder.layers.2.downsample.conv2.c.weight": (320, 1, 3, 3),
        "image_encoder.layers.3.blocks.1.local_conv.bn.num_batches_tracked": (),
        "image_encoder.head.weight": (1000, 320),
        "image_encoder.neck.2.weight": (256, 256, 3, 3),
        "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix": (2, 128),
        "prompt_encoder.mask_downscaling.3.weight": (16, 4, 2, 2),
        "mask_decoder.transformer.layers.1.cross_attn_image_to_token.q_proj.weight": (128, 256),
        "mask_decoder.output_hypernetworks_mlps.3.layers.2.weight": (32, 256),
        "mask_decoder.iou_prediction_head.layers.2.bias": (4,),
    }
    assert {key: shapes.get(key) for key in expected} == expected


def spoilt(tmp_path: Path, change: Any) -> str:
    """What is said of a checkpoint after `change`."""
    found = dict(network(small_sizes()).state_dict())
    change(found)
    torch.save(found, tmp_path / "spoilt.pt")
    with pytest.raises(WeightsError) as caught:
        load_network(tmp_path / "spoilt.pt", small_sizes())
    return str(caught.value)


def test_a_missing_key_is_named(tmp_path: Path) -> None:
    said = spoilt(tmp_path, lambda found: found.pop("image_encoder.neck.0.weight"))
    assert "is not MobileSAM: it lacks 1 keys (image_encoder.neck.0.weight)" in said


def test_an_unknown_key_is_named(tmp_path: Path) -> None:
    assert "holds the unknown 1 keys (extra)" in spoilt(tmp_path, lambda found: found.update(extra=torch.zeros(1)))


def test_a_key_of_another_shape_is_named(tmp_path: Path) -> None:
    said = spoilt(tmp_path, lambda found: found.update({"mask_decoder.iou_token.weight": torch.zeros(1, 5)}))
    assert "has another shape of 1 keys (mask_decoder.iou_token.weight)" in said


def test_a_checkpoint_of_another_network_is_refused(tmp_path: Path) -> None:
    path = save(network(small_sizes()), tmp_path / "small.pt")
    with pytest.raises(WeightsError, match="has another shape of"):
        load_network(path)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "evil.pt"
    path.write_bytes(pickle.dumps(print))
    with pytest.raises(WeightsError, match="is no readable checkpoint"):
        load_network(path)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path) -> None:
    path = save(network(small_sizes()), tmp_path / "half.pt")
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(WeightsError, match="is no readable checkpoint"):
        load_network(path)


def test_the_exports_are_whole_and_have_their_checksums(tmp_path: Path) -> None:
    export(exported() / "mobile_sam.pt", tmp_path, small_sizes())
    assert {path.name for path in tmp_path.iterdir()} == {
        name + suffix for name in (ENCODER_FILE, DECODER_FILE) for suffix in ("", ".sha256")
    }
    assert {state(tmp_path / name) for name in (ENCODER_FILE, DECODER_FILE)} == {State.WHOLE}
