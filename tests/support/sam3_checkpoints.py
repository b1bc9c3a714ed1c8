"""SAM 3 with small random weights: as the hub has it, and as Meta's own checkpoint has it, saved for the production code.

It knows nothing of the world, but answers: some instances pass the usual threshold, and masks are blobs of some size. Meta's
names are written here once more, the other way round, from the modules of facebookresearch/sam3.
"""

from __future__ import annotations

import atexit
import gzip
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

SEED = 11
SIDE, PATCH, WIDTH = 224, 14, 32
GRID = SIDE // PATCH
QUERIES = 10
TOKENS = 600
NEEDS = "needs torch and transformers: make torch"
MERGES = ("c u", "cu p</w>", "t h", "th e</w>")
FUSED = re.compile(r"^(detector_model\..*)\.([qkv])_proj\.(weight|bias)$")
"""Attention of the detector; the tracker's has three matrices in both layouts."""

NAMES = (
    (r"^detector_model\.vision_encoder\.backbone\.", "detector.backbone.vision_backbone.trunk."),
    (r"^detector_model\.vision_encoder\.neck\.fpn_layers\.", "detector.backbone.vision_backbone.convs."),
    (r"^tracker_neck\.fpn_layers\.", "detector.backbone.vision_backbone.sam2_convs."),
    (r"(convs\.0)\.scale_layers\.0\.", r"\1.dconv_2x2_0."),
    (r"(convs\.0)\.scale_layers\.2\.", r"\1.dconv_2x2_1."),
    (r"(convs\.1)\.scale_layers\.0\.", r"\1.dconv_2x2."),
    (r"(convs\.\d)\.proj1\.", r"\1.conv_1x1."),
    (r"(convs\.\d)\.proj2\.", r"\1.conv_3x3."),
    (r"trunk\.embeddings\.position_embeddings", "trunk.pos_embed"),
    (r"trunk\.embeddings\.patch_embeddings\.projection\.", "trunk.patch_embed.proj."),
    (r"trunk\.layer_norm\.", "trunk.ln_pre."),
    (r"trunk\.layers\.(\d+)\.layer_norm", r"trunk.blocks.\1.norm"),
    (r"trunk\.layers\.(\d+)\.attention\.in_proj_(\w+)", r"trunk.blocks.\1.attn.qkv.\2"),
    (r"trunk\.layers\.(\d+)\.attention\.o_proj\.", r"trunk.blocks.\1.attn.proj."),
    (r"trunk\.layers\.", "trunk.blocks."),
    (r"^detector_model\.text_projection\.", "detector.backbone.language_backbone.resizer."),
    (r"^detector_model\.text_encoder\.text_projection\.weight$", "detector.backbone.language_backbone.encoder.text_projection"),
    (r"^detector_model\.text_encoder\.text_model\.", "detector.backbone.language_backbone.encoder."),
    (r"encoder\.embeddings\.token_embedding\.", "encoder.token_embedding."),
    (r"encoder\.embeddings\.position_embedding\.weight", "encoder.positional_embedding"),
    (r"encoder\.final_layer_norm\.", "encoder.ln_final."),
    (r"encoder\.encoder\.layers\.(\d+)\.layer_norm", r"encoder.transformer.resblocks.\1.ln_"),
    (r"encoder\.encoder\.layers\.(\d+)\.self_attn\.", r"encoder.transformer.resblocks.\1.attn."),
    (r"encoder\.encoder\.layers\.(\d+)\.mlp\.fc1\.", r"encoder.transformer.resblocks.\1.mlp.c_fc."),
    (r"encoder\.encoder\.layers\.(\d+)\.mlp\.fc2\.", r"encoder.transformer.resblocks.\1.mlp.c_proj."),
    (r"^detector_model\.geometry_encoder\.layers\.", "detector.geometry_encoder.encode."),
    (r"^detector_model\.geometry_encoder\.vision_layer_norm\.", "detector.geometry_encoder.img_pre_norm."),
    (r"^detector_model\.geometry_encoder\.prompt_layer_norm\.", "detector.geometry_encoder.norm."),
    (r"^detector_model\.geometry_encoder\.output_layer_norm\.", "detector.geometry_encoder.encode_norm."),
    (r"^detector_model\.geometry_encoder\.", "detector.geometry_encoder."),
    (r"^detector_model\.detr_encoder\.", "detector.transformer.encoder."),
    (r"(encode\.\d+|encoder\.layers\.\d+)\.cross_attn\.", r"\1.cross_attn_image."),
    (r"(encode\.\d+|encoder\.layers\.\d+)\.layer_norm(\d)", r"\1.norm\2"),
    (r"^detector_model\.detr_decoder\.output_layer_norm\.", "detector.transformer.decoder.norm."),
    (r"^detector_model\.detr_decoder\.presence_layer_norm\.", "detector.transformer.decoder.presence_token_out_norm."),
    (r"^detector_model\.detr_decoder\.", "detector.transformer.decoder."),
    (r"decoder\.presence_head\.layer", "decoder.presence_token_head.layer"),
    (r"decoder\.box_head\.layer", "decoder.bbox_embed.layer"),
    (r"decoder\.box_rpb_embed_", "decoder.boxRPB_embed_"),
    (r"(decoder\.layers\.\d+)\.vision_cross_attn\.", r"\1.cross_attn."),
    (r"(decoder\.layers\.\d+)\.text_cross_attn\.", r"\1.ca_text."),
    (r"(decoder\.layers\.\d+)\.vision_cross_attn_layer_norm\.", r"\1.norm1."),
    (r"(decoder\.layers\.\d+)\.text_cross_attn_layer_norm\.", r"\1.catext_norm."),
    (r"(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.mlp_layer_norm\.", r"\1.norm3."),
    (r"(^detector\.(?:transformer|geometry_encoder)\..*)\.mlp\.fc(\d)\.", r"\1.linear\2."),
    (r"^detector_model\.dot_product_scoring\.text_mlp_out_norm\.", "detector.dot_prod_scoring.prompt_mlp.out_norm."),
    (r"^detector_model\.dot_product_scoring\.text_mlp\.", "detector.dot_prod_scoring.prompt_mlp."),
    (r"^detector_model\.dot_product_scoring\.text_proj\.", "detector.dot_prod_scoring.prompt_proj."),
    (r"^detector_model\.dot_product_scoring\.query_proj\.", "detector.dot_prod_scoring.hs_proj."),
    (r"^detector_model\.mask_decoder\.", "detector.segmentation_head."),
    (r"segmentation_head\.mask_embedder\.", "segmentation_head.mask_predictor.mask_embed."),
    (r"segmentation_head\.instance_projection\.", "segmentation_head.instance_seg_head."),
    (r"segmentation_head\.semantic_projection\.", "segmentation_head.semantic_seg_head."),
    (r"segmentation_head\.prompt_cross_attn\.", "segmentation_head.cross_attend_prompt."),
    (r"segmentation_head\.prompt_cross_attn_norm\.", "segmentation_head.cross_attn_norm."),
    (r"^tracker_model\.no_memory_embedding$", "tracker.no_mem_embed"),
    (r"^tracker_model\.no_memory_positional_encoding$", "tracker.no_mem_pos_enc"),
    (r"^tracker_model\.prompt_encoder\.", "tracker.sam_prompt_encoder."),
    (r"prompt_encoder\.shared_embedding\.positional_embedding", "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix"),
    (r"prompt_encoder\.mask_embed\.conv1\.", "prompt_encoder.mask_downscaling.0."),
    (r"prompt_encoder\.mask_embed\.layer_norm1\.", "prompt_encoder.mask_downscaling.1."),
    (r"prompt_encoder\.mask_embed\.conv2\.", "prompt_encoder.mask_downscaling.3."),
    (r"prompt_encoder\.mask_embed\.layer_norm2\.", "prompt_encoder.mask_downscaling.4."),
    (r"prompt_encoder\.mask_embed\.conv3\.", "prompt_encoder.mask_downscaling.6."),
    (r"^tracker_model\.mask_decoder\.", "tracker.sam_mask_decoder."),
    (r"sam_mask_decoder\.upscale_conv1\.", "sam_mask_decoder.output_upscaling.0."),
    (r"sam_mask_decoder\.upscale_layer_norm\.", "sam_mask_decoder.output_upscaling.1."),
    (r"sam_mask_decoder\.upscale_conv2\.", "sam_mask_decoder.output_upscaling.3."),
    (r"(sam_mask_decoder\.transformer\..*)\.mlp\.proj_in\.", r"\1.mlp.lin1."),
    (r"(sam_mask_decoder\.transformer\..*)\.mlp\.proj_out\.", r"\1.mlp.lin2."),
    (r"(sam_mask_decoder\.transformer\..*)layer_norm", r"\1norm"),
    (r"(_head|_mlps\.\d)\.layers\.0\.", r"\1.layers.1."),
    (r"(_head|_mlps\.\d)\.proj_in\.", r"\1.layers.0."),
    (r"(_head|_mlps\.\d)\.proj_out\.", r"\1.layers.2."),
    (r"\.o_proj\.", ".out_proj."),
)
"""The names of transformers' video model as Meta's, each rule on what the ones before it left."""
COUNTED_FROM_NOUGHT = re.compile(r"((?:token|ref_point)_head|bbox_embed|boxRPB_embed_[xy]|prompt_mlp)\.layer(\d)\.")


def needs_sam3() -> None:
    """Skip the test, with a reason, where the networks cannot be made or run."""
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason=NEEDS)


@contextmanager
def one_thread() -> Iterator[None]:
    """Matrices this small are far faster without company."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@cache
def configuration() -> Any:
    """The architecture in small: 16 x 16 patches, two layers of each kind."""
    from transformers import Sam3VideoConfig

    backbone = {
        "model_type": "sam3_vit_model",
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "window_size": 8,
        "global_attn_indexes": [1],
        "pretrain_image_size": SIDE // 2,
    }
    vision = {
        "model_type": "sam3_vision_model",
        "backbone_config": backbone,
        "fpn_hidden_size": WIDTH,
        "backbone_feature_sizes": [[4 * GRID] * 2, [2 * GRID] * 2, [GRID] * 2],
    }
    text = {
        "model_type": "clip_text_model",
        "vocab_size": TOKENS,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "projection_dim": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 32,
        "hidden_act": "gelu",
        "bos_token_id": 2 * 256 + len(MERGES),
        "eos_token_id": 2 * 256 + len(MERGES) + 1,
    }
    sizes = {"hidden_size": WIDTH, "num_attention_heads": 4}
    layers = {**sizes, "num_layers": 2, "intermediate_size": 64}
    detector = {
        "model_type": "sam3",
        "vision_config": vision,
        "text_config": text,
        "geometry_encoder_config": layers,
        "detr_encoder_config": layers,
        "detr_decoder_config": {**layers, "num_queries": QUERIES},
        "mask_decoder_config": sizes,
    }
    tracker = {
        "model_type": "sam3_tracker_video",
        "vision_config": vision,
        "prompt_encoder_config": {"hidden_size": WIDTH, "image_size": SIDE, "patch_size": PATCH},
        "mask_decoder_config": {**sizes, "mlp_dim": 64, "iou_head_hidden_dim": WIDTH},
        "image_size": SIDE,
        "memory_attention_hidden_size": WIDTH,
        "memory_attention_feed_forward_hidden_size": 64,
        "memory_attention_num_layers": 1,
        "memory_attention_rope_feat_sizes": [GRID, GRID],
        "memory_encoder_hidden_size": WIDTH,
        "memory_encoder_output_channels": 16,
        "mask_downsampler_embed_dim": WIDTH,
        "memory_fuser_embed_dim": WIDTH,
        "memory_fuser_intermediate_dim": 64,
        "memory_fuser_num_layers": 1,
    }
    return Sam3VideoConfig(detector_config=detector, tracker_config=tracker, low_res_mask_size=4 * GRID)


@cache
def tensors() -> dict[str, Any]:
    """Random weights of the video model, always the same, under the names that the hub's file has."""
    import torch
    from transformers import Sam3VideoModel

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        made = Sam3VideoModel(configuration()).state_dict()
        for name, values in made.items():
            if values.dim() > 1:
                values.normal_(0, values[0].numel() ** -0.5)
            elif name.endswith("bias"):
                values.normal_(0, 0.1)
            if values.dim() == 4 and ("scale_layers" in name or "upscale_conv" in name):
                # A random enlargement would draw a chessboard: here each cell becomes four alike.
                values.copy_(2 * values.mean(dim=(2, 3), keepdim=True).expand_as(values))
        for name in ("detector_model.detr_decoder.query_embed.weight", "detector_model.detr_decoder.reference_points.weight"):
            made[name].normal_(0, 2)
        for name in ("tracker_model.no_memory_embedding", "tracker_model.shared_image_embedding.positional_embedding"):
            made[name].normal_()
    shared = made["tracker_model.shared_image_embedding.positional_embedding"]
    made["tracker_model.prompt_encoder.shared_embedding.positional_embedding"] = shared.clone()
    for name, values in made.items():
        if "detr_decoder.layers" in name and ("cross_attn.o_proj.weight" in name or "mlp.fc2.weight" in name):
            values.mul_(0.3)  # else all queries would become one
    made["detector_model.detr_decoder.presence_head.layer3.bias"].fill_(4)
    made["detector_model.dot_product_scoring.query_proj.weight"].mul_(12)
    pixels = made["detector_model.mask_decoder.instance_projection.weight"]
    pixels.sub_(pixels.mean(dim=1, keepdim=True))  # pixels are above 0: without it each mask would be everything or nothing
    made["detector_model.mask_decoder.mask_embedder.layers.2.weight"].mul_(8)
    for index in range(4):
        made[f"tracker_model.mask_decoder.output_hypernetworks_mlps.{index}.proj_out.weight"].mul_(8)
    made["tracker_model.mask_decoder.iou_prediction_head.proj_out.bias"].copy_(torch.tensor([2.4, 3.0, 2.3, 2.6]))
    return {name: values.clone().contiguous() for name, values in made.items()}


def meta_tensors(made: dict[str, Any]) -> dict[str, Any]:
    """The same weights as Meta's checkpoint has them, with some that only its own code needs."""
    import torch

    fused: dict[str, Any] = {}
    for name, values in made.items():
        found = FUSED.match(name)
        if found is None:
            fused[name] = values
        elif found[2] == "q":
            thirds = [made[f"{found[1]}.{part}_proj.{found[3]}"] for part in "qkv"]
            fused[f"{found[1]}.in_proj_{found[3]}"] = torch.cat(thirds)
    del fused["tracker_model.shared_image_embedding.positional_embedding"]
    kinds = fused.pop("tracker_model.prompt_encoder.point_embed.weight")
    renamed = {meta_name(name): values for name, values in fused.items()}
    renamed |= {f"tracker.sam_prompt_encoder.point_embeddings.{index}.weight": kinds[index : index + 1] for index in range(4)}
    places = "detector.backbone.vision_backbone.trunk.pos_embed"
    renamed[places] = torch.cat([torch.full_like(renamed[places][:, :1], 9.0), renamed[places]], dim=1)
    sideways = "detector.backbone.language_backbone.encoder.text_projection"
    renamed[sideways] = renamed[sideways].T.contiguous()
    renamed["detector.backbone.vision_backbone.trunk.blocks.0.attn.freqs_cis"] = torch.zeros(64, 4, dtype=torch.complex64)
    renamed["detector.geometry_encoder.points_direct_project.weight"] = torch.zeros(WIDTH, 2)
    return renamed


def meta_name(name: str) -> str:
    """One name in Meta's layout, queries, keys and values fused already."""
    for there, here in NAMES:
        name = re.sub(there, here, name)
    return COUNTED_FROM_NOUGHT.sub(lambda found: f"{found[1]}.layers.{int(found[2]) - 1}.", name)


def save_vocabulary(folder: Path, form: str = "tokenizer.json") -> None:
    """Letters of bytes, a few merges and the ends, in one of the three forms."""
    from transformers import CLIPTokenizer

    from models.sam3_text import END, META_FILE, START, byte_letters

    lines = ["#version: 0.2", *MERGES]
    if form == META_FILE:
        (folder / META_FILE).write_bytes(gzip.compress("\n".join(lines).encode()))
        return
    letters = byte_letters()
    words = [*letters, *(f"{letter}</w>" for letter in letters), *(merge.replace(" ", "") for merge in MERGES), START, END]
    vocab = {word: index for index, word in enumerate(words)}
    if form == "vocab.json":
        (folder / "vocab.json").write_text(json.dumps(vocab), encoding="utf-8")
        (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return
    tokenizer = CLIPTokenizer(vocab=vocab, merges=[tuple(merge.split()) for merge in MERGES])
    tokenizer.save_pretrained(folder)


def temporary() -> Path:
    """A folder for this process."""
    made = Path(tempfile.mkdtemp(prefix="maskd-sam3-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


@cache
def folder() -> Path:
    """The hub's layout: config.json, model.safetensors, tokenizer.json; skips the test where it cannot be made."""
    needs_sam3()
    from safetensors.torch import save_file

    made = temporary()
    configuration().save_pretrained(made)
    save_file(tensors(), made / "model.safetensors", metadata={"format": "pt"})
    save_vocabulary(made)
    return made


@cache
def meta_file() -> Path:
    """Meta's `sam3.pt`, its vocabulary beside it, and a config.json since the network is small."""
    needs_sam3()
    import torch

    from models.sam3_text import META_FILE

    made = temporary()
    configuration().save_pretrained(made)
    torch.save({"model": meta_tensors(tensors())}, made / "sam3.pt")
    save_vocabulary(made, META_FILE)
    return made / "sam3.pt"


@cache
def engine() -> Any:
    """The production engine over the hub's layout."""
    from models.sam3 import load
    from models.torch_device import Placement

    with one_thread():
        return load(folder(), Placement())
