"""TinyViT, MobileSAM's image encoder, in torch: to turn a checkpoint into ONNX, never to serve.

Enters: a normalised image, padded to a square. Leaves: its embedding. Names of modules are the keys of `mobile_sam.pt`, so
that a checkpoint loads strictly. Architecture: Wu et al., ECCV 2022, as MobileSAM (Zhang et al., 2023) changed it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

STRIDE = 16
"""Model pixels per pixel of the embedding."""


@dataclass(frozen=True, slots=True)
class EncoderSizes:
    """The dimensions of an encoder; the defaults are MobileSAM's. One entry per stage; the first stage is convolutional."""

    side: int = 1024
    widths: tuple[int, int, int, int] = (64, 128, 160, 320)
    depths: tuple[int, int, int, int] = (2, 2, 6, 2)
    heads: tuple[int, int, int, int] = (2, 4, 5, 10)
    windows: tuple[int, int, int, int] = (7, 7, 14, 7)
    classes: int = 1000
    out_width: int = 256


class ConvNorm(nn.Sequential):
    """A convolution without bias, then batch normalisation."""

    def __init__(self, width_in: int, width_out: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__()
        self.add_module("c", nn.Conv2d(width_in, width_out, kernel, stride, kernel // 2, groups=groups, bias=False))
        self.add_module("bn", nn.BatchNorm2d(width_out))


class ChannelNorm(nn.Module):
    """Layer normalisation over the channels of each pixel, (b, c, h, w)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x_bchw: Tensor) -> Tensor:
        pixels = functional.layer_norm(x_bchw.permute(0, 2, 3, 1), self.weight.shape, self.weight, self.bias, 1e-6)
        return pixels.permute(0, 3, 1, 2)


class PatchEmbed(nn.Module):
    """Two strided convolutions: a pixel per 4 x 4."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(ConvNorm(3, width // 2, 3, 2), nn.GELU(), ConvNorm(width // 2, width, 3, 2))

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.seq(x_bchw)


class ConvBlock(nn.Module):
    """Inverted bottleneck: widen, convolve by channel, narrow, add."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width, 4 * width)
        self.conv2 = ConvNorm(4 * width, 4 * width, 3, groups=4 * width)
        self.conv3 = ConvNorm(4 * width, width)

    def forward(self, x_bchw: Tensor) -> Tensor:
        inner = functional.gelu(self.conv2(functional.gelu(self.conv1(x_bchw))))
        return functional.gelu(x_bchw + self.conv3(inner))


class Merge(nn.Module):
    """To the next stage: other width, and half the size where the stride is 2."""

    def __init__(self, width_in: int, width_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(width_in, width_out)
        self.conv2 = ConvNorm(width_out, width_out, 3, stride, groups=width_out)
        self.conv3 = ConvNorm(width_out, width_out)

    def forward(self, x_bchw: Tensor) -> Tensor:
        return self.conv3(functional.gelu(self.conv2(functional.gelu(self.conv1(x_bchw)))))


class WindowAttention(nn.Module):
    """Self-attention among the pixels of a window, with a learnt bias per distance (|dy|, |dx|)."""

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        line = torch.arange(window)
        ys, xs = line.repeat_interleave(window), line.repeat(window)
        distances = (ys[:, None] - ys).abs() * window + (xs[:, None] - xs).abs()
        self.register_buffer("distances", distances, persistent=False)

    def forward(self, x_bnc: Tensor) -> Tensor:
        batch, count, width = x_bnc.shape
        depth = width // self.heads
        qkv = self.qkv(self.norm(x_bnc)).view(batch, count, self.heads, 3 * depth).transpose(1, 2)
        query, key, value = qkv.split(depth, dim=3)
        weights = query @ key.transpose(2, 3) * depth**-0.5 + self.attention_biases[:, self.distances]
        return self.proj((weights.softmax(dim=3) @ value).transpose(1, 2).reshape(batch, count, width))


class Feedforward(nn.Module):
    """Normalise, widen by four, narrow."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x_bnc: Tensor) -> Tensor:
        return self.fc2(functional.gelu(self.fc1(self.norm(x_bnc))))


class AttentionBlock(nn.Module):
    """Attention in windows, a convolution by channel, a feedforward. `side` is the size of its square input."""

    def __init__(self, width: int, heads: int, window: int, side: int) -> None:
        super().__init__()
        self.side, self.window = side, window
        self.attn = WindowAttention(width, heads, window)
        self.mlp = Feedforward(width)
        self.local_conv = ConvNorm(width, width, 3, groups=width)

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = self.local_conv(x_bchw + self._attended(x_bchw))
        pixels = x.flatten(2).transpose(1, 2)
        return (pixels + self.mlp(pixels)).transpose(1, 2).reshape(x.shape)

    def _attended(self, x_bchw: Tensor) -> Tensor:
        """Attention within windows; the last ones reach over the rim, where zeros stand, as in training."""
        side, window, width = self.side, self.window, x_bchw.shape[1]
        count = -(-side // window)
        rim = count * window - side
        x = functional.pad(x_bchw, (0, rim, 0, rim)).permute(0, 2, 3, 1)
        x = x.reshape(-1, count, window, count, window, width).transpose(2, 3)
        x = self.attn(x.reshape(-1, window * window, width))
        x = x.reshape(-1, count, count, window, window, width).transpose(2, 3)
        x = x.reshape(-1, count * window, count * window, width)
        return x[:, :side, :side].permute(0, 3, 1, 2)


class Stage(nn.Module):
    """Blocks, then the way to the next stage if there is one."""

    def __init__(self, blocks: list[nn.Module], merge: Merge | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = merge

    def forward(self, x_bchw: Tensor) -> Tensor:
        for block in self.blocks:
            x_bchw = block(x_bchw)
        return x_bchw if self.downsample is None else self.downsample(x_bchw)


class TinyViT(nn.Module):
    """The encoder: (b, 3, side, side) normalised to (b, out_width, side / 16, side / 16). Its classifier is only loaded."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.patch_embed = PatchEmbed(sizes.widths[0])
        self.layers = nn.ModuleList(_stage(sizes, number) for number in range(4))
        self.norm_head = nn.LayerNorm(sizes.widths[-1])
        self.head = nn.Linear(sizes.widths[-1], sizes.classes)
        self.neck = nn.Sequential(
            nn.Conv2d(sizes.widths[-1], sizes.out_width, 1, bias=False),
            ChannelNorm(sizes.out_width),
            nn.Conv2d(sizes.out_width, sizes.out_width, 3, padding=1, bias=False),
            ChannelNorm(sizes.out_width),
        )

    def forward(self, x_bchw: Tensor) -> Tensor:
        x = self.patch_embed(x_bchw)
        for stage in self.layers:
            x = stage(x)
        return self.neck(x)


def _stage(sizes: EncoderSizes, number: int) -> Stage:
    width, depth = sizes.widths[number], sizes.depths[number]
    side = sizes.side // (4, 8, 16, 16)[number]
    if number == 0:
        blocks: list[nn.Module] = [ConvBlock(width) for _ in range(depth)]
    else:
        blocks = [AttentionBlock(width, sizes.heads[number], sizes.windows[number], side) for _ in range(depth)]
    merge = Merge(width, sizes.widths[number + 1], (2, 2, 1)[number]) if number < 3 else None
    return Stage(blocks, merge)
