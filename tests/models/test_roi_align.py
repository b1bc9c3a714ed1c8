"""RoI align against its definition, sample by sample."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from support.sam3_checkpoints import needs_sam3

needs_sam3()
import torch  # noqa: E402  the tests are skipped without it

from models.roi_align import roi_align  # noqa: E402

BOXES = [
    (2.0, 3.0, 9.0, 8.0),  # whole cells
    (2.3, 3.7, 9.1, 8.2),
    (0.0, 0.0, 12.0, 10.0),  # all of it
    (4.4, 4.4, 4.6, 4.5),  # smaller than a cell
    (5.0, 5.0, 5.0, 5.0),  # nothing
    (-3.0, -2.5, 4.0, 3.0),  # out above and to the left
    (9.0, 7.5, 15.0, 14.0),  # out below and to the right
    (20.0, 20.0, 30.0, 30.0),  # wholly outside
    (11.5, 9.5, 12.9, 10.9),  # within a cell of the edge
    (7.0, 6.0, 3.0, 2.0),  # inside out
]
Features = npt.NDArray[np.float64]


def bilinear(features_chw: Features, y: float, x: float) -> Features:
    """A sample, 0 when it lies more than a cell outside."""
    _, height, width = features_chw.shape
    if y < -1 or y > height or x < -1 or x > width:
        return np.zeros(len(features_chw))
    y, x = max(y, 0), max(x, 0)
    top, left = int(y), int(x)
    if top >= height - 1:
        top = bottom = height - 1
        y = top
    else:
        bottom = top + 1
    if left >= width - 1:
        left = right = width - 1
        x = left
    else:
        right = left + 1
    low_y, low_x = y - top, x - left
    return (
        (1 - low_y) * (1 - low_x) * features_chw[:, top, left]
        + (1 - low_y) * low_x * features_chw[:, top, right]
        + low_y * (1 - low_x) * features_chw[:, bottom, left]
        + low_y * low_x * features_chw[:, bottom, right]
    )


def by_definition(features_chw: Features, box: tuple[float, ...], size: tuple[int, int], **how: Any) -> Features:
    """The mean of the samples of each bin, as torchvision's kernel loops over them."""
    scale, ratio, aligned = how.get("spatial_scale", 1.0), how.get("sampling_ratio", -1), how.get("aligned", False)
    x0, y0, x1, y1 = (edge * scale - (0.5 if aligned else 0) for edge in box)
    height, width = (y1 - y0, x1 - x0) if aligned else (max(y1 - y0, 1.0), max(x1 - x0, 1.0))
    bin_h, bin_w = height / size[0], width / size[1]
    rows, columns = (ratio, ratio) if ratio > 0 else (math.ceil(bin_h), math.ceil(bin_w))
    pooled = np.zeros((len(features_chw), *size))
    for i in range(size[0]):
        for j in range(size[1]):
            for row in range(rows):
                for column in range(columns):
                    y = y0 + i * bin_h + (row + 0.5) * bin_h / rows
                    x = x0 + j * bin_w + (column + 0.5) * bin_w / columns
                    pooled[:, i, j] += bilinear(features_chw, y, x)
    return pooled / max(rows * columns, 1)


@pytest.fixture(scope="module")
def features() -> Any:
    return torch.randn(2, 3, 10, 12, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"aligned": True},
        {"sampling_ratio": 2},
        {"spatial_scale": 0.5},
        {"spatial_scale": 0.7, "sampling_ratio": 3, "aligned": True},
    ],
)
@pytest.mark.parametrize("size", [(7, 7), (2, 3), (1, 1)])
def test_every_box_is_pooled_as_the_definition_says(features: Any, size: tuple[int, int], how: dict[str, Any]) -> None:
    found = roi_align(features, [torch.tensor(BOXES), torch.tensor(BOXES[:2])], size, **how)
    wanted = [by_definition(features[0].double().numpy(), box, size, **how) for box in BOXES]
    wanted += [by_definition(features[1].double().numpy(), box, size, **how) for box in BOXES[:2]]
    assert found.shape == (len(BOXES) + 2, 3, *size)
    assert np.abs(found.numpy() - np.stack(wanted)).max() < 1e-5


def test_one_number_is_a_square_and_half_precision_stays(features: Any) -> None:
    found = roi_align(features.half(), [torch.tensor(BOXES[:2]).half(), torch.zeros(0, 4).half()], 7)
    assert (tuple(found.shape), found.dtype) == ((2, 3, 7, 7), torch.float16)
    whole = roi_align(features.half().float(), [torch.tensor(BOXES[:2]).half().float(), torch.zeros(0, 4)], (7, 7))
    assert torch.equal(found, whole.half())


def test_no_box_is_no_map(features: Any) -> None:
    assert roi_align(features, [torch.zeros(0, 4)] * 2, (7, 5)).shape == (0, 3, 7, 5)
