"""`mobile_sam.pt` to two ONNX files with the inputs and outputs that MobileSAM's exports have everywhere.

Enters: a checkpoint. Leaves: `mobile_sam_image_encoder.onnx` and `sam_mask_decoder_multi.onnx`. Needs torch and onnx; what
comes out needs neither.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from models.sam_decoder import DecoderSizes, MaskDecoder, PromptEncoder
from models.tiny_vit import STRIDE, EncoderSizes, TinyViT
from models.weights import DECODER_FILE, ENCODER_FILE, WeightsError, record, sha256_of

MEAN_RGB = (123.675, 116.28, 103.53)
STD_RGB = (58.395, 57.12, 57.375)
OPSET = 17
SHOWN_MAX = 3


@dataclass(frozen=True, slots=True)
class Sizes:
    """The dimensions of both halves; the defaults are MobileSAM's."""

    encoder: EncoderSizes = field(default_factory=EncoderSizes)
    decoder: DecoderSizes = field(default_factory=DecoderSizes)


class MobileSamNetwork(nn.Module):
    """The whole network under the names of its checkpoint."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.image_encoder = TinyViT(sizes.encoder)
        self.prompt_encoder = PromptEncoder(sizes.decoder, sizes.encoder.side)
        self.mask_decoder = MaskDecoder(sizes.decoder)


class EncoderGraph(nn.Module):
    """RGB 0..255, (height, width, 3), long side already the model's, to the embedding: normalises and pads inside."""

    def __init__(self, network: MobileSamNetwork, sizes: Sizes) -> None:
        super().__init__()
        self.side = sizes.encoder.side
        self.encoder = network.image_encoder
        self.register_buffer("mean", torch.tensor(MEAN_RGB), persistent=False)
        self.register_buffer("std", torch.tensor(STD_RGB), persistent=False)

    def forward(self, input_image: Tensor) -> Tensor:
        x = ((input_image - self.mean) / self.std).permute(2, 0, 1).unsqueeze(0)
        padded = functional.pad(x, (0, self.side - x.shape[3], 0, self.side - x.shape[2]))
        return self.encoder(padded.reshape(1, 3, self.side, self.side))  # shapes known from here on


class DecoderGraph(nn.Module):
    """SAM's usual decoder signature, with objects in the batch dimension of points, labels and masks."""

    def __init__(self, network: MobileSamNetwork, sizes: Sizes) -> None:
        super().__init__()
        self.side = sizes.encoder.side
        self.prompts, self.decoder = network.prompt_encoder, network.mask_decoder
        places = network.prompt_encoder.pe_layer.grid(self.side // STRIDE).detach()
        self.register_buffer("places", places, persistent=False)

    def forward(
        self,
        image_embeddings: Tensor,
        point_coords: Tensor,
        point_labels: Tensor,
        mask_input: Tensor,
        has_mask_input: Tensor,
        orig_im_size: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        image = image_embeddings + self.prompts.dense(mask_input, has_mask_input)
        low, ious = self.decoder(image, self.places, self.prompts.tokens(point_coords, point_labels))
        return self._enlarged(low, orig_im_size), ious, low

    def _enlarged(self, low: Tensor, size_hw: Tensor) -> Tensor:
        """The masks at the image's size: over the padded square, cropped, then scaled."""
        square = functional.interpolate(low, size=(self.side, self.side), mode="bilinear", align_corners=False)
        inner_hw = (size_hw * (self.side / size_hw.max()) + 0.5).floor().long()
        whole_hw = size_hw.long()
        inner = square[:, :, : inner_hw[0], : inner_hw[1]]
        return functional.interpolate(inner, size=(whole_hw[0], whole_hw[1]), mode="bilinear", align_corners=False)


def load_network(checkpoint: Path, sizes: Sizes | None = None) -> MobileSamNetwork:
    """The network with the checkpoint's weights, every key used and none missing. Raises WeightsError."""
    try:
        found = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling raises whatever it likes; the reason is for the operator
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise WeightsError(f"{checkpoint} is no readable checkpoint: {reason[0][:200]}") from error
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise WeightsError(f"{checkpoint} is not a dictionary of tensors")
    network = MobileSamNetwork(sizes or Sizes())
    _check_keys(checkpoint, network.state_dict(), found)
    network.load_state_dict(found, strict=True)
    return network.eval()


def export(checkpoint: Path, folder: Path, sizes: Sizes | None = None) -> tuple[Path, Path]:
    """Write encoder and decoder into `folder`; their paths. Raises WeightsError."""
    sizes = sizes or Sizes()
    network = load_network(checkpoint, sizes)
    folder.mkdir(parents=True, exist_ok=True)
    encoder, decoder = folder / ENCODER_FILE, folder / DECODER_FILE
    with torch.no_grad():
        _write(
            EncoderGraph(network, sizes),
            _encoder_example(sizes),
            encoder,
            ["input_image"],
            ["image_embeddings"],
            {
                "input_image": {0: "height", 1: "width"},
            },
        )
        objects = {0: "objects"}
        names = ["image_embeddings", "point_coords", "point_labels", "mask_input", "has_mask_input", "orig_im_size"]
        points = {0: "objects", 1: "points"}
        axes = {"point_coords": points, "point_labels": points, "mask_input": objects, "has_mask_input": objects}
        outputs = {"masks": {0: "objects", 2: "height", 3: "width"}, "iou_predictions": objects, "low_res_masks": objects}
        _write(DecoderGraph(network, sizes), _decoder_example(sizes), decoder, names, list(outputs), {**axes, **outputs})
    return encoder, decoder


def _encoder_example(sizes: Sizes) -> tuple[Tensor, ...]:
    return (torch.zeros(sizes.encoder.side * 3 // 4, sizes.encoder.side, 3),)


def _decoder_example(sizes: Sizes) -> tuple[Tensor, ...]:
    side = sizes.encoder.side
    return (
        torch.zeros(1, sizes.decoder.width, side // STRIDE, side // STRIDE),
        torch.zeros(2, 3, 2),
        torch.ones(2, 3),
        torch.zeros(2, 1, side // 4, side // 4),
        torch.zeros(2),
        torch.tensor([float(side * 3 // 4), float(side)]),
    )


def _write(
    graph: nn.Module, example: tuple[Tensor, ...], path: Path, inputs: list[str], outputs: list[str], axes: dict[str, Any]
) -> None:
    """Trace into a file that appears whole or not at all, and note its checksum."""
    part = path.with_name(path.name + ".part")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the tracer doubts every shape that it turns into a constant; tests compare
            torch.onnx.export(
                graph.eval(),
                example,
                str(part),
                input_names=inputs,
                output_names=outputs,
                dynamic_axes=axes,
                opset_version=OPSET,
                dynamo=False,
            )
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    record(path, sha256_of(path))


def _check_keys(checkpoint: Path, wanted: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    """Say which keys are missing, unknown or of another shape."""
    wrong = {
        "lacks": [key for key in wanted if key not in found],
        "holds the unknown": [key for key in found if key not in wanted],
        "has another shape of": [key for key in wanted if key in found and wanted[key].shape != found[key].shape],
    }
    said = [f"{what} {len(keys)} keys ({', '.join(keys[:SHOWN_MAX])})" for what, keys in wrong.items() if keys]
    if said:
        raise WeightsError(f"{checkpoint} is not MobileSAM: it {'; '.join(said)}")
