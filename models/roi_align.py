"""RoI align without torchvision, by torchvision's definition: every bin of a box is the mean of bilinear samples.

Enters: feature maps on the device, boxes in their cells. Leaves: one small map per box. Source: He et al. 2017, Mask R-CNN, and
the operator `torchvision.ops.roi_align`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Tensor = Any
Floats = npt.NDArray[np.float32]


def roi_align(
    features_nchw: Tensor,
    boxes: Sequence[Tensor],
    output_size: int | tuple[int, int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """The boxes of each image, (k, 4) xyxy, as maps (sum of k, channels, *output_size) in their order.

    A box times `spatial_scale` is in cells of the features. A bin has `sampling_ratio` samples a side, or, where that is not
    above 0, as many as it has cells. `aligned` takes half a cell off, so that cell 0 has its centre at 0, and lets boxes be
    smaller than a cell.
    """
    import torch

    bins_h, bins_w = (output_size, output_size) if isinstance(output_size, int) else output_size
    height, width = features_nchw.shape[-2:]
    pooled = []
    for features_chw, boxes_xyxy in zip(features_nchw, boxes, strict=True):
        edges = boxes_xyxy.float().cpu().numpy() * np.float32(spatial_scale) - np.float32(0.5 if aligned else 0)
        rows = [_weights(box[1], box[3], bins_h, height, sampling_ratio, aligned) for box in edges]
        columns = [_weights(box[0], box[2], bins_w, width, sampling_ratio, aligned) for box in edges]
        shares = (_stacked(rows, (bins_h, height)), _stacked(columns, (bins_w, width)))
        rows_kih, columns_kjw = (torch.from_numpy(share).to(features_chw.device) for share in shares)
        # Bilinear weights, means and the zeros outside are all products of a row's and a column's: two matrices say it all.
        pooled.append(torch.einsum("kih,chw,kjw->kcij", rows_kih, features_chw.float(), columns_kjw))
    return torch.cat(pooled).to(features_nchw.dtype)


def _weights(first: np.float32, last: np.float32, bins: int, length: int, sampling_ratio: int, aligned: bool) -> Floats:
    """How much each of `length` cells counts in each bin between two edges, (bins, length)."""
    weights = np.zeros((bins, length), dtype=np.float32)
    size = last - first if aligned else max(last - first, np.float32(1))
    samples = sampling_ratio if sampling_ratio > 0 else math.ceil(size / np.float32(bins))
    if samples <= 0:
        return weights
    steps = np.arange(bins, dtype=np.float32)[:, None] + (np.arange(samples, dtype=np.float32) + np.float32(0.5)) / samples
    places = first + steps * (size / np.float32(bins))
    share = ((places >= -1) & (places <= length)).astype(np.float32) / samples
    places = np.clip(places, 0, length - 1)
    low = places.astype(np.int64)
    high = np.minimum(low + 1, length - 1)
    fraction = places - low
    which = np.broadcast_to(np.arange(bins)[:, None], low.shape)
    np.add.at(weights, (which, low), share * (1 - fraction))
    np.add.at(weights, (which, high), share * fraction)
    return weights


def _stacked(weights: Sequence[Floats], shape: tuple[int, int]) -> Floats:
    """Weights of all boxes, (k, bins, cells), also of none."""
    return np.stack(weights) if weights else np.zeros((0, *shape), dtype=np.float32)
