"""LaMa and Stable Diffusion for inpainting in small, with random weights, in the layouts that the production code loads.

They know nothing of the world, but answer: LaMa with pixels of which each depends on all others, diffusion with pictures that
depend on prompt, seed, mask and all that is around it.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.sam3_checkpoints import save_vocabulary

SEED = 23
WIDTH = 8
TOKENS = 600
LENGTH = 20
NEEDS_TORCH = "needs torch and transformers: make torch"
NEEDS_DIFFUSERS = "needs torch, transformers and diffusers: make torch"
NEEDS_ONNX = "needs onnx and onnxruntime: the extra [dev]"


def needs_torch() -> None:
    """Skip the test, with a reason, where TorchScript cannot be made or run."""
    for module in ("torch", "transformers"):
        pytest.importorskip(module, reason=NEEDS_TORCH)


def needs_onnx() -> None:
    """Skip the test, with a reason, where ONNX files cannot be made or run."""
    for module in ("onnx", "onnxruntime"):
        pytest.importorskip(module, reason=NEEDS_ONNX)


def needs_diffusers() -> None:
    """Skip the test, with a reason, where a pipeline cannot be made or run."""
    for module in ("torch", "transformers", "diffusers"):
        pytest.importorskip(module, reason=NEEDS_DIFFUSERS)


def temporary() -> Path:
    """A folder for this process."""
    made = Path(tempfile.mkdtemp(prefix="maskd-inpaint-"))
    atexit.register(shutil.rmtree, made, ignore_errors=True)
    return made


def small_lama(*, damaged: bool = False, one_only: bool = False) -> Any:
    """Two convolutions around a Fourier unit, as in LaMa; composited with what is not missing, as in big-lama.pt."""
    import torch
    from torch import nn

    class Small(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(4, WIDTH, 3, padding=1, padding_mode="reflect")
            self.spectral = nn.Conv2d(2 * WIDTH, 2 * WIDTH, 1)
            self.last = nn.Conv2d(WIDTH, 3, 3, padding=1, padding_mode="reflect")
            self.one_only = one_only

        def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            if image.shape[2] % 8 != 0 or image.shape[3] % 8 != 0 or (self.one_only and image.shape[0] > 1):
                raise RuntimeError("a size that this network does not take")
            seen = torch.relu(self.first(torch.cat([image * (1 - mask), mask], dim=1)))
            waves = torch.fft.rfftn(seen, dim=[2, 3], norm="ortho")
            mixed = torch.relu(self.spectral(torch.cat([waves.real, waves.imag], dim=1)))
            real, imaginary = mixed.chunk(2, dim=1)
            whole = torch.fft.irfftn(torch.complex(real, imaginary), s=[seen.shape[2], seen.shape[3]], dim=[2, 3], norm="ortho")
            painted = torch.sigmoid(self.last(seen + whole))
            return mask * painted + (1 - mask) * image

    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        made = Small().eval()
    if damaged:
        with torch.no_grad():
            made.last.bias.fill_(float("nan"))
    return made


def save_script(network: Any, path: Path) -> Path:
    """As big-lama.pt is saved."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(network), str(path))
    return path


@cache
def script() -> Path:
    """A TorchScript file, for this process."""
    return save_script(small_lama(), temporary() / "big-lama.pt")


def save_onnx(path: Path, side: int | None, white: float = 255.0, *, damaged: bool = False, batch: int | str = "batch") -> Path:
    """One convolution of image and mask, composited; for squares of a side or for any size, white at 255 or 1."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    sides: list[int | str] = ["height", "width"] if side is None else [side, side]
    random = np.random.default_rng(SEED)
    values = {
        "kernel": random.normal(0, 0.3, (3, 4, 5, 5)),
        "bias": np.full(3, np.nan if damaged else 0.1),
        "one": np.ones(1),
        "white": np.full(1, white),
    }
    nodes = [
        helper.make_node("Concat", ["image", "mask"], ["both"], axis=1),
        helper.make_node("Conv", ["both", "kernel", "bias"], ["raw"], pads=[2, 2, 2, 2]),
        helper.make_node("Sigmoid", ["raw"], ["painted"]),
        helper.make_node("Mul", ["painted", "mask"], ["inside"]),
        helper.make_node("Sub", ["one", "mask"], ["known"]),
        helper.make_node("Mul", ["image", "known"], ["outside"]),
        helper.make_node("Add", ["inside", "outside"], ["whole"]),
        helper.make_node("Mul", ["whole", "white"], ["output"]),
    ]

    def value(name: str, channels: int) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, channels, *sides])

    constants = [numpy_helper.from_array(array.astype(np.float32), name) for name, array in values.items()]
    graph = helper.make_graph(nodes, "lama", [value("image", 3), value("mask", 1)], [value("output", 3)], constants)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@cache
def onnx_file(side: int | None, white: float = 255.0) -> Path:
    """An ONNX file, for this process."""
    return save_onnx(temporary() / f"lama_{side}_{white:.0f}.onnx", side, white)


def pipeline() -> Any:
    """A StableDiffusionInpaintPipeline of which eight pixels are one latent, always the same."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    tokens = temporary()
    save_vocabulary(tokens)
    tokenizer = CLIPTokenizer.from_pretrained(tokens, model_max_length=LENGTH)
    text = CLIPTextConfig(
        vocab_size=TOKENS,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        unet = UNet2DConditionModel(
            sample_size=16,
            in_channels=9,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=8,
        )
        vae = AutoencoderKL(
            block_out_channels=(32,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            latent_channels=4,
        )
        encoder = CLIPTextModel(text)
    return StableDiffusionInpaintPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=PNDMScheduler(
            skip_prk_steps=True, steps_offset=1, beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@cache
def diffusion_folder() -> Path:
    """The pipeline in the hub's layout, for this process; skips the test where it cannot be made."""
    needs_diffusers()
    folder = temporary() / "small-inpainting"
    pipeline().save_pretrained(folder)
    return folder


@cache
def diffusion_engine() -> Any:
    """The production engine over that folder."""
    from models.diffusion import load
    from models.torch_device import Placement

    return load(diffusion_folder(), Placement())
