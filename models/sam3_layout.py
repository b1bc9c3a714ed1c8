"""The names that SAM 3's weights have in Meta's own checkpoint, as those of transformers' Sam3Model and Sam3TrackerModel.

Enters: tensors by name as `sam3.pt` holds them. Leaves: tensors by name of each of the two networks. Source of the names: the
modules of facebookresearch/sam3. What neither network has (memory, points of the detector) keeps its name and is of no use.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

State = dict[str, Any]
"""Tensors by name."""
Renames = tuple[tuple[str, str], ...]
"""Parts of a name and what stands there instead, in this order."""


@dataclass(frozen=True, slots=True)
class Branch:
    """A part of a network: how its names begin there and here, and what else is different in the whole name."""

    there: str
    here: str
    renames: Renames = ()


LAYER: Renames = (
    (".out_proj.", ".o_proj."),
    ("in_proj_", "qkv."),
    (".linear1.", ".mlp.fc1."),
    (".linear2.", ".mlp.fc2."),
)
FUSED_LAYER: Renames = ((".cross_attn_image.", ".cross_attn."), *LAYER, (".norm", ".layer_norm"))
NECK: Renames = (
    ("dconv_2x2_0.", "scale_layers.0."),
    ("dconv_2x2_1.", "scale_layers.2."),
    ("dconv_2x2.", "scale_layers.0."),
    ("conv_1x1.", "proj1."),
    ("conv_3x3.", "proj2."),
)

DETECTOR = (
    Branch(
        "backbone.vision_backbone.trunk.",
        "vision_encoder.backbone.",
        (
            ("pos_embed", "embeddings.position_embeddings"),
            ("patch_embed.proj.", "embeddings.patch_embeddings.projection."),
            ("ln_pre.", "layer_norm."),
            (".blocks.", ".layers."),
            (".norm", ".layer_norm"),
            (".attn.proj.", ".attention.o_proj."),
            (".attn.", ".attention."),
        ),
    ),
    Branch("backbone.vision_backbone.convs.", "vision_encoder.neck.fpn_layers.", NECK),
    Branch("backbone.language_backbone.resizer.", "text_projection."),
    Branch(
        "backbone.language_backbone.encoder.",
        "text_encoder.",
        (
            ("token_embedding.", "text_model.embeddings.token_embedding."),
            ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
            ("ln_final.", "text_model.final_layer_norm."),
            ("text_projection", "text_projection.weight"),
            ("transformer.resblocks.", "text_model.encoder.layers."),
            (".attn.", ".self_attn."),
            ("in_proj_", "qkv."),
            (".ln_", ".layer_norm"),
            (".c_fc.", ".fc1."),
            (".c_proj.", ".fc2."),
        ),
    ),
    Branch(
        "geometry_encoder.",
        "geometry_encoder.",
        (
            ("img_pre_norm.", "vision_layer_norm."),
            ("encode_norm.", "output_layer_norm."),
            ("geometry_encoder.norm.", "geometry_encoder.prompt_layer_norm."),
            (".encode.", ".layers."),
            *FUSED_LAYER,
        ),
    ),
    Branch("transformer.encoder.", "detr_encoder.", FUSED_LAYER),
    Branch(
        "transformer.decoder.",
        "detr_decoder.",
        (
            ("detr_decoder.norm.", "detr_decoder.output_layer_norm."),
            ("presence_token_head.", "presence_head."),
            ("presence_token_out_norm.", "presence_layer_norm."),
            ("bbox_embed.", "box_head."),
            ("boxRPB_embed_", "box_rpb_embed_"),
            (".cross_attn.", ".vision_cross_attn."),
            (".ca_text.", ".text_cross_attn."),
            (".norm1.", ".vision_cross_attn_layer_norm."),
            (".catext_norm.", ".text_cross_attn_layer_norm."),
            (".norm2.", ".self_attn_layer_norm."),
            (".norm3.", ".mlp_layer_norm."),
            *LAYER,
        ),
    ),
    Branch(
        "dot_prod_scoring.",
        "dot_product_scoring.",
        (
            ("prompt_mlp.out_norm.", "text_mlp_out_norm."),
            ("prompt_mlp.", "text_mlp."),
            ("prompt_proj.", "text_proj."),
            ("hs_proj.", "query_proj."),
        ),
    ),
    Branch(
        "segmentation_head.",
        "mask_decoder.",
        (
            ("mask_predictor.mask_embed.", "mask_embedder."),
            ("instance_seg_head.", "instance_projection."),
            ("semantic_seg_head.", "semantic_projection."),
            ("cross_attend_prompt.", "prompt_cross_attn."),
            ("cross_attn_norm.", "prompt_cross_attn_norm."),
            *LAYER,
        ),
    ),
)

TRACKER_NECK = Branch("backbone.vision_backbone.sam2_convs.", "vision_encoder.neck.fpn_layers.", NECK)
"""It stands beside the detector's own."""
TRACKER = (
    Branch("no_mem_embed", "no_memory_embedding"),
    Branch(
        "sam_prompt_encoder.",
        "prompt_encoder.",
        (
            ("pe_layer.positional_encoding_gaussian_matrix", "shared_embedding.positional_embedding"),
            ("mask_downscaling.0.", "mask_embed.conv1."),
            ("mask_downscaling.1.", "mask_embed.layer_norm1."),
            ("mask_downscaling.3.", "mask_embed.conv2."),
            ("mask_downscaling.4.", "mask_embed.layer_norm2."),
            ("mask_downscaling.6.", "mask_embed.conv3."),
        ),
    ),
    Branch(
        "sam_mask_decoder.",
        "mask_decoder.",
        (
            ("output_upscaling.0.", "upscale_conv1."),
            ("output_upscaling.1.", "upscale_layer_norm."),
            ("output_upscaling.3.", "upscale_conv2."),
            (".norm", ".layer_norm"),
            (".out_proj.", ".o_proj."),
            (".lin1.", ".proj_in."),
            (".lin2.", ".proj_out."),
            (".mlp.layers.0.", ".mlp.proj_in."),
            (".mlp.layers.1.", ".mlp.proj_out."),
        ),
    ),
)

COUNTED_FROM_ONE = re.compile(r"\b(box_head|presence_head|ref_point_head|box_rpb_embed_[xy]|text_mlp)\.layers\.(\d)")
THREE_LAYERS = re.compile(r"\b(output_hypernetworks_mlps\.\d+|iou_prediction_head|pred_obj_score_head)\.layers\.([012])")
NAMES_OF_THREE = ("proj_in", "layers.0", "proj_out")
POINT_KINDS = 4


def from_meta(tensors: Mapping[str, Any]) -> tuple[State, State]:
    """The detector's and the tracker's tensors; none of the tracker where the checkpoint is of images only."""
    detector_given = _below("detector.", tensors)
    detector = {_renamed(name, DETECTOR): tensor for name, tensor in detector_given.items()}
    tracker = {_renamed(name, TRACKER): tensor for name, tensor in _below("tracker.", tensors).items()}
    if tracker:
        neck = _below(TRACKER_NECK.there, detector_given)
        tracker |= {_renamed(TRACKER_NECK.there + name, (TRACKER_NECK,)): tensor for name, tensor in neck.items()}
        _complete_tracker(tracker)
    _complete_detector(detector)
    return _split(detector), tracker


def _below(prefix: str, tensors: Mapping[str, Any]) -> State:
    """The tensors whose names begin so, without that beginning."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _renamed(name: str, branches: tuple[Branch, ...]) -> str:
    """A name in transformers' layout; one of no branch stays."""
    for branch in branches:
        if name.startswith(branch.there):
            name = branch.here + name.removeprefix(branch.there)
            for there, here in branch.renames:
                name = name.replace(there, here)
            name = COUNTED_FROM_ONE.sub(lambda found: f"{found[1]}.layer{int(found[2]) + 1}", name)
            return THREE_LAYERS.sub(lambda found: f"{found[1]}.{NAMES_OF_THREE[int(found[2])]}", name)
    return name


def _complete_detector(detector: State) -> None:
    """Drop the place of the class token, which the network does not have, and turn the one matrix that is stored on its side."""
    places = "vision_encoder.backbone.embeddings.position_embeddings"
    if places in detector:
        detector[places] = detector[places][:, 1:].contiguous()
    sideways = "text_encoder.text_projection.weight"
    if sideways in detector:
        detector[sideways] = detector[sideways].T.contiguous()


def _complete_tracker(tracker: State) -> None:
    """One table of the kinds of points, and the positions' matrix once more, under the name of the image's."""
    import torch

    kinds = [f"prompt_encoder.point_embeddings.{kind}.weight" for kind in range(POINT_KINDS)]
    if all(kind in tracker for kind in kinds):
        tracker["prompt_encoder.point_embed.weight"] = torch.cat([tracker.pop(kind) for kind in kinds])
    shared = "prompt_encoder.shared_embedding.positional_embedding"
    if shared in tracker:
        tracker["shared_image_embedding.positional_embedding"] = tracker[shared].clone()


def _split(tensors: State) -> State:
    """Queries, keys and values apart where one matrix holds all three."""
    split: State = {}
    for name, tensor in tensors.items():
        if ".qkv." in name:
            for part, third in zip("qkv", tensor.chunk(3), strict=True):
                split[name.replace(".qkv.", f".{part}_proj.")] = third
        else:
            split[name] = tensor
    return split
