"""SAM 3's detector in two steps: the ViT, which sees images once, and the head, which answers many prompts about them.

Enters: pixels, features of texts, boxes, all on the device. Leaves: scores and mask logits on the device. The library's code
runs unchanged but for three places, which `prepare` mends on one network and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from models.roi_align import roi_align

Tensor = Any
Maps = tuple[Tensor, Tensor, Tensor]
"""What the head sees in n images: feature maps (n, channels, cells, cells) with 4, 2 and 1 cells per patch of the ViT."""

LEVELS = 3
"""The fourth and coarsest level of the neck is dropped by the head itself."""


@dataclass(frozen=True, slots=True)
class Exemplars:
    """Boxes around examples for n prompts: (n, k, 4) centre and size, 0 to 1; (n, k) 1 = such, 0 = not such, -10 = none."""

    boxes: Tensor
    labels: Tensor


def prepare(detector: Any, grid: int) -> None:
    """Mend a detector whose ViT has `grid` x `grid` patches; its answers stay the same, bit by bit.

    - RoI align comes from torchvision, which need not be there.
    - Sizes come from a tensor on the device, which stops the device once a layer and torch.compile altogether.
    - The two finest maps are copied and then only read: 53 MB a prompt in half precision.
    """
    from transformers.models.sam3 import modeling_sam3

    if not hasattr(modeling_sam3, "torchvision"):  # the name is left out where the package is
        modeling_sam3.torchvision = SimpleNamespace(ops=SimpleNamespace(roi_align=roi_align))
    bias_of = detector.detr_decoder._get_rpb_matrix

    def bias_with_numbers(boxes: Tensor, shape: object) -> Tensor:
        return bias_of(boxes, (grid, grid))

    def embed_pixels(backbone_features: Sequence[Tensor], encoder_hidden_states: Tensor) -> Tensor:
        seen = encoder_hidden_states[:, : grid * grid].transpose(1, 2)
        seen = seen.reshape(len(seen), -1, grid, grid)
        return detector.mask_decoder.pixel_decoder([*backbone_features[:-1], seen])

    detector.detr_decoder._get_rpb_matrix = bias_with_numbers
    detector.mask_decoder._embed_pixels = embed_pixels


def look(detector: Any, images_nhwc: Tensor) -> Tensor:
    """What the ViT sees in uint8 RGB images (n, side, side, 3): (n, patches, width). Normalised here: 0..255 becomes -1..1."""
    dtype = detector.text_projection.weight.dtype
    pixels = (images_nhwc.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    return detector.vision_encoder.backbone(pixels.to(dtype)).last_hidden_state


def neck(vision_encoder: Any, seen: Tensor, grid: int) -> Maps:
    """The maps of n images from what the ViT saw, (n, patches, width), by the detector's neck or the tracker's."""
    spatial = seen.view(len(seen), grid, grid, -1).permute(0, 3, 1, 2)
    fine, middle, coarse = (layer(spatial) for layer in vision_encoder.neck.fpn_layers[:LEVELS])
    return fine, middle, coarse


def answer(
    detector: Any, maps: Maps, features: Tensor, mask: Tensor, exemplars: Exemplars | None = None
) -> tuple[Tensor, Tensor]:
    """Scores (n, queries), float32, and mask logits (n, queries, low, low) of n pairs of image and prompt.

    `features` (n, tokens, width) and `mask` (n, tokens) are those of the texts. The score of a query is its own probability
    times that of the concept being there at all, as in Meta's processor.
    """
    from transformers.modeling_outputs import BaseModelOutputWithPooling
    from transformers.models.sam3.modeling_sam3 import Sam3VisionEncoderOutput

    coarse = maps[-1]
    place = detector.vision_encoder.neck.position_encoding((1, *coarse.shape[1:]), coarse.device, coarse.dtype)
    places = place.expand(len(coarse), -1, -1, -1)
    # The head drops the last level of both, and looks at the positions of the then last one only.
    seen = Sam3VisionEncoderOutput(fpn_hidden_states=(*maps, coarse), fpn_position_encoding=(places, places))
    found = detector(
        vision_embeds=seen,
        text_embeds=BaseModelOutputWithPooling(pooler_output=features),
        attention_mask=mask,
        input_boxes=None if exemplars is None else exemplars.boxes,
        input_boxes_labels=None if exemplars is None else exemplars.labels,
    )
    return found.pred_logits.float().sigmoid() * found.presence_logits.float().sigmoid(), found.pred_masks
