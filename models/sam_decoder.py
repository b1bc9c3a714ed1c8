"""SAM's prompt encoder and mask decoder in torch: to turn a checkpoint into ONNX, never to serve.

Enters: an image embedding and prompts in model pixels. Leaves: four low-resolution masks per object, and their predicted IoU.
Names of modules are the keys of SAM's checkpoints. Architecture: Kirillov et al., Segment Anything, ICCV 2023, appendix A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.tiny_vit import ChannelNorm

MASKS = 4
"""The first is for unambiguous prompts, the others are three guesses for one point."""
LABELS = 4
"""Background point, foreground point, upper left and lower right corner of a box; -1 is no point at all."""


@dataclass(frozen=True, slots=True)
class DecoderSizes:
    """The dimensions of a decoder; the defaults are those of all SAM models."""

    width: int = 256
    heads: int = 8
    layers: int = 2
    mlp_width: int = 2048
    mask_width: int = 16
    iou_width: int = 256


class PositionEncoding(nn.Module):
    """Random Fourier features of positions in 0..1 (Tancik et al., 2020)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, width // 2))

    def forward(self, positions_xy: Tensor) -> Tensor:
        angles = 2 * math.pi * ((2 * positions_xy - 1) @ self.positional_encoding_gaussian_matrix)
        return torch.cat([angles.sin(), angles.cos()], dim=-1)

    def grid(self, side: int) -> Tensor:
        """Of the centres of side x side pixels, (side * side, width)."""
        line = (torch.arange(side, dtype=torch.float32) + 0.5) / side
        ys, xs = torch.meshgrid(line, line, indexing="ij")
        return self(torch.stack([xs, ys], dim=-1).flatten(0, 1))


class PromptEncoder(nn.Module):
    """Points and box corners to tokens, a mask to an image."""

    def __init__(self, sizes: DecoderSizes, side: int) -> None:
        super().__init__()
        self.side = side
        self.pe_layer = PositionEncoding(sizes.width)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, sizes.width) for _ in range(LABELS))
        self.not_a_point_embed = nn.Embedding(1, sizes.width)
        self.no_mask_embed = nn.Embedding(1, sizes.width)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, sizes.mask_width // 4, 2, 2),
            ChannelNorm(sizes.mask_width // 4),
            nn.GELU(),
            nn.Conv2d(sizes.mask_width // 4, sizes.mask_width, 2, 2),
            ChannelNorm(sizes.mask_width),
            nn.GELU(),
            nn.Conv2d(sizes.mask_width, sizes.width, 1),
        )

    def tokens(self, points_bnc: Tensor, labels_bn: Tensor) -> Tensor:
        """(b, n, 2) model pixels and (b, n) labels to (b, n, width)."""
        kinds = labels_bn.unsqueeze(-1)
        found = self.pe_layer((points_bnc + 0.5) / self.side) * (kinds != -1).float()
        found = found + self.not_a_point_embed.weight * (kinds == -1).float()
        for kind, embedding in enumerate(self.point_embeddings):
            found = found + embedding.weight * (kinds == kind).float()
        return found

    def dense(self, masks_b1hw: Tensor, given_b: Tensor) -> Tensor:
        """(b, 1, side / 4, side / 4) logits to (b, width, side / 16, side / 16); where `given` is 0, what stands for none."""
        given = given_b.reshape(-1, 1, 1, 1)
        none = self.no_mask_embed.weight.reshape(1, -1, 1, 1)
        return given * self.mask_downscaling(masks_b1hw) + (1 - given) * none


class Attention(nn.Module):
    """Multi-head attention, with a narrower inside where it reads from the image."""

    def __init__(self, width: int, inner: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, inner) for _ in range(3))
        self.out_proj = nn.Linear(inner, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).softmax(dim=3)
        return self.out_proj((weights @ v).transpose(1, 2).flatten(2))

    def _split(self, x_bnc: Tensor) -> Tensor:
        return x_bnc.unflatten(2, (self.heads, -1)).transpose(1, 2)


class TokenMlp(nn.Module):
    """Widen, ReLU, narrow."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.lin1, self.lin2 = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x_bnc: Tensor) -> Tensor:
        return self.lin2(functional.relu(self.lin1(x_bnc)))


class TwoWayLayer(nn.Module):
    """Tokens look at each other, then at the image; then the image looks at the tokens."""

    def __init__(self, sizes: DecoderSizes, first: bool) -> None:
        super().__init__()
        width, inner = sizes.width, sizes.width // 2
        self.first = first
        self.self_attn = Attention(width, width, sizes.heads)
        self.cross_attn_token_to_image = Attention(width, inner, sizes.heads)
        self.cross_attn_image_to_token = Attention(width, inner, sizes.heads)
        self.mlp = TokenMlp(width, sizes.mlp_width)
        self.norm1, self.norm2, self.norm3, self.norm4 = (nn.LayerNorm(width) for _ in range(4))

    def forward(self, tokens: Tensor, pixels: Tensor, token_places: Tensor, pixel_places: Tensor) -> tuple[Tensor, Tensor]:
        if self.first:  # the tokens are still nothing but their places
            tokens = self.self_attn(tokens, tokens, tokens)
        else:
            placed = tokens + token_places
            tokens = tokens + self.self_attn(placed, placed, tokens)
        tokens = self.norm1(tokens)
        seen = self.cross_attn_token_to_image(tokens + token_places, pixels + pixel_places, pixels)
        tokens = self.norm2(tokens + seen)
        tokens = self.norm3(tokens + self.mlp(tokens))
        seen = self.cross_attn_image_to_token(pixels + pixel_places, tokens + token_places, tokens)
        return tokens, self.norm4(pixels + seen)


class TwoWayTransformer(nn.Module):
    """The layers, and a last look of the tokens at the image."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(TwoWayLayer(sizes, number == 0) for number in range(sizes.layers))
        self.final_attn_token_to_image = Attention(sizes.width, sizes.width // 2, sizes.heads)
        self.norm_final_attn = nn.LayerNorm(sizes.width)

    def forward(self, places: Tensor, pixels: Tensor, pixel_places: Tensor) -> tuple[Tensor, Tensor]:
        tokens = places
        for layer in self.layers:
            tokens, pixels = layer(tokens, pixels, places, pixel_places)
        seen = self.final_attn_token_to_image(tokens + places, pixels + pixel_places, pixels)
        return self.norm_final_attn(tokens + seen), pixels


class Mlp(nn.Module):
    """Three linear layers with ReLU between them."""

    def __init__(self, width: int, inner: int, width_out: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(width, inner), nn.Linear(inner, inner), nn.Linear(inner, width_out)])

    def forward(self, x: Tensor) -> Tensor:
        first, second, last = self.layers
        return last(functional.relu(second(functional.relu(first(x)))))


class MaskDecoder(nn.Module):
    """Tokens and image to masks: each mask token becomes the weights of a sum over channels of the enlarged image."""

    def __init__(self, sizes: DecoderSizes) -> None:
        super().__init__()
        width = sizes.width
        self.transformer = TwoWayTransformer(sizes)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(MASKS, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, 2, 2),
            ChannelNorm(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, 2, 2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(Mlp(width, width, width // 8) for _ in range(MASKS))
        self.iou_prediction_head = Mlp(width, sizes.iou_width, MASKS)

    def forward(self, image_bchw: Tensor, places: Tensor, prompts_bnc: Tensor) -> tuple[Tensor, Tensor]:
        """Image with the dense prompt added, places of its pixels (h * w, c), prompt tokens to logits (b, 4, 4h, 4w) and
        predicted IoU (b, 4)."""
        own = torch.cat([self.iou_token.weight, self.mask_tokens.weight]).unsqueeze(0).expand(prompts_bnc.shape[0], -1, -1)
        tokens, pixels = self.transformer(torch.cat([own, prompts_bnc], dim=1), image_bchw.flatten(2).transpose(1, 2), places)
        enlarged = self.output_upscaling(pixels.transpose(1, 2).reshape(image_bchw.shape))
        weights = torch.stack([mlp(tokens[:, 1 + index]) for index, mlp in enumerate(self.output_hypernetworks_mlps)], dim=1)
        logits = (weights @ enlarged.flatten(2)).unflatten(2, (enlarged.shape[2], enlarged.shape[3]))
        return logits, self.iou_prediction_head(tokens[:, 0])
