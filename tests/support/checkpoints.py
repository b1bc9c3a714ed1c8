"""MobileSAM with random weights, small or full-size, in the layout of `mobile_sam.pt` and exported by the production code.

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

SEED = 7
SMALL_SIDE = 256
NEEDS = "needs torch, onnx and onnxruntime: pip install torch==2.13.0, and the extra [dev]"


def needs_torch() -> None:
    """Skip the test, with a reason, where a network cannot be made or run."""
    for module in ("torch", "onnx", "onnxruntime"):
        pytest.importorskip(module, reason=NEEDS)


def small_sizes() -> Any:
    """The architecture in small: 256 model pixels, one block a stage but for one."""
    from models.export_mobile_sam import Sizes
    from models.sam_decoder import DecoderSizes
    from models.tiny_vit import EncoderSizes

    encoder = EncoderSizes(SMALL_SIDE, (8, 16, 24, 32), (1, 1, 2, 1), (1, 2, 3, 4), (7, 7, 14, 7), classes=10, out_width=32)
    return Sizes(encoder, DecoderSizes(width=32, heads=4, mlp_width=64, mask_width=8, iou_width=16))


def network(sizes: Any) -> Any:
    """Random weights, statistics of normalisation included, always the same."""
    import torch

    from models.export_mobile_sam import MobileSamNetwork

    torch.manual_seed(SEED)
    made = MobileSamNetwork(sizes).eval()
    for name, values in made.state_dict().items():
        if name.endswith("running_mean"):
            values.normal_(0, 0.1)
        elif name.endswith("running_var"):
            values.uniform_(0.5, 1.5)
        elif name.endswith("attention_biases"):
            values.normal_(0, 0.5)
    decoder = made.mask_decoder
    with torch.no_grad():
        # A random enlargement would draw a chessboard: here each cell of the embedding becomes one, as smooth as it gets.
        for layer in (decoder.output_upscaling[0], decoder.output_upscaling[3]):
            layer.weight.copy_(2 * layer.weight.mean(dim=(2, 3), keepdim=True).expand_as(layer.weight))
        for mlp in decoder.output_hypernetworks_mlps:
            mlp.layers[2].weight.mul_(3000)
            mlp.layers[2].bias.mul_(3000)
        decoder.iou_prediction_head.layers[2].bias.copy_(torch.tensor([0.92, 0.95, 0.91, 0.93]))
    return made


def save(made: Any, path: Path) -> Path:
    """The checkpoint as it is published: a dictionary of tensors."""
    import torch

    torch.save(made.state_dict(), path)
    return path


@cache
def exported(full: bool = False) -> Path:
    """A folder with the checkpoint and both ONNX files, for this process; skips the test where they cannot be made."""
    needs_torch()
    from models.export_mobile_sam import Sizes, export

    folder = Path(tempfile.mkdtemp(prefix="maskd-weights-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    sizes = Sizes() if full else small_sizes()
    export(save(network(sizes), folder / "mobile_sam.pt"), folder, sizes)
    return folder


@cache
def engine(full: bool = False, threads: int = 1, runtime: str = "onnxruntime") -> Any:
    """The production engine over those files; its runtime is the one that is everywhere, unless a test is about another."""
    from models.mobile_sam import load
    from models.weights import DECODER_FILE, ENCODER_FILE

    folder = exported(full)
    return load(folder / ENCODER_FILE, folder / DECODER_FILE, threads, runtime)
