"""SAM 2 with random weights, small, in the hub's layout: of the image model, and of the video model that the hub really has.

It knows nothing of the world, but answers: logits are large enough to be stable and predicted IoUs high enough to pass.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SEED = 11
SIDE = 128
LOW_SIDE = 32
NEEDS = "needs torch and transformers: make torch"
VISION = {
    "backbone_config": {
        "model_type": "sam2_hiera_det_model",
        "hidden_size": 8,
        "image_size": [SIDE, SIDE],
        "blocks_per_stage": [1, 1, 2, 1],
        "embed_dim_per_stage": [8, 16, 32, 64],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "window_size_per_stage": [4, 2, 4, 2],
        "global_attention_blocks": [3],
    },
    "backbone_channel_list": [64, 32, 16, 8],
    "backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]],
    "fpn_hidden_size": 32,
}
PROMPTS = {"hidden_size": 32, "image_size": SIDE}
DECODER = {"hidden_size": 32, "mlp_dim": 64, "num_attention_heads": 4, "iou_head_hidden_dim": 32}
MEMORY = {
    "memory_attention_hidden_size": 32,
    "memory_attention_feed_forward_hidden_size": 32,
    "memory_attention_rope_feat_sizes": [8, 8],
    "memory_encoder_hidden_size": 32,
    "memory_encoder_output_channels": 16,
    "mask_downsampler_embed_dim": 32,
    "memory_fuser_embed_dim": 32,
    "memory_fuser_intermediate_dim": 64,
}


def needs_transformers() -> None:
    """Skip the test, with a reason, where a network cannot be made or run. One thread is fastest for small ones."""
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason=NEEDS)
    import torch

    torch.set_num_threads(1)


def network(video: bool = False) -> Any:
    """Random weights, always the same in all that both kinds have."""
    import torch
    from transformers import Sam2Config, Sam2Model, Sam2VideoConfig, Sam2VideoModel

    parts = {"vision_config": VISION, "prompt_encoder_config": PROMPTS, "mask_decoder_config": DECODER}
    torch.manual_seed(SEED)
    made = Sam2Model(Sam2Config(**parts)).eval()
    with torch.no_grad():
        made.no_memory_embedding.normal_(0, 0.2)
        made.vision_encoder.backbone.pos_embed.normal_(0, 0.2)
        made.vision_encoder.backbone.pos_embed_window.normal_(0, 0.2)
        for name, weights in made.named_parameters():
            random = name.startswith(("vision_encoder", "mask_decoder")) and "embed" not in name and "token" not in name
            if random and weights.dim() > 1:
                weights.normal_(0, weights[0].numel() ** -0.5)
        speak_up(made.mask_decoder)
    if not video:
        return made
    whole = Sam2VideoModel(Sam2VideoConfig(**parts, **MEMORY)).eval()
    whole.load_state_dict(made.state_dict(), strict=False)
    return whole


def speak_up(decoder: Any) -> None:
    """Make a random decoder answer with clear masks of parts of the image, and with high predicted IoUs."""
    import torch

    # A random enlargement would draw a chessboard: here each cell of the embedding becomes one, as smooth as it gets.
    for layer in (decoder.upscale_conv1, decoder.upscale_conv2):
        layer.weight.copy_(2 * layer.weight.mean(dim=(2, 3), keepdim=True).expand_as(layer.weight))
    for mlp in decoder.output_hypernetworks_mlps:
        mlp.proj_out.weight.mul_(30)
        mlp.proj_out.weight.sub_(mlp.proj_out.weight.mean(dim=0))  # what all channels share would decide for all or nothing
    decoder.iou_prediction_head.proj_out.bias.copy_(torch.tensor([0.92, 0.95, 0.91, 0.93]).logit())


def save(made: Any, folder: Path) -> Path:
    """The folder as the hub has it: config.json and model.safetensors."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    made.config.save_pretrained(folder)
    save_file({name: values.contiguous() for name, values in made.state_dict().items()}, folder / "model.safetensors")
    return folder


@cache
def checkpoint(video: bool = False) -> Path:
    """A folder for this process; skips the test where it cannot be made."""
    needs_transformers()
    folder = Path(tempfile.mkdtemp(prefix="maskd-weights-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return save(network(video), folder / "sam2-small")


@cache
def engine(crop_layers: int = 0, half: bool = False) -> Any:
    """The production engine over that folder."""
    from models.sam2 import load
    from models.torch_device import Placement

    return load(checkpoint(), Placement(half=half), crop_layers)
