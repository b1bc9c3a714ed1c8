"""The files of a result: run lengths as pycocotools reads them, the PNG as Pillow reads it, and what they cost."""

from __future__ import annotations

import io
import json
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from handlers._instances import LABELS_BYTES_MAX, Facts, Instance, colours, result
from handlers._png import mask_png, painted
from handlers._rle import compressed, counts_of, expanded, mask_of, segmentation
from handlers.base import Job, Result, SourceImage
from models.base import Mask, MaskHW, pack

MASKS = arrays(np.bool_, array_shapes(min_dims=2, max_dims=2, max_side=12))
OFFSETS = st.tuples(st.integers(0, 5), st.integers(0, 5))
FACTS = Facts("mock", "mock", "cpu", False)


def placed(mask_hw: MaskHW, offset_xy: tuple[int, int], margin: int = 3) -> MaskHW:
    """The mask in an image with some room around."""
    height, width = mask_hw.shape
    image_hw = np.zeros((offset_xy[1] + height + margin, offset_xy[0] + width + margin), dtype=np.bool_)
    image_hw[offset_xy[1] : offset_xy[1] + height, offset_xy[0] : offset_xy[0] + width] = mask_hw
    return image_hw


def coco_rle(mask_hw: MaskHW) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask_hw.astype(np.uint8)))
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def squares(count: int, size_wh: tuple[int, int], side: int) -> list[Mask]:
    """Squares in rows, from the top left."""
    per_row = size_wh[0] // side
    return [pack(np.ones((side, side), dtype=np.bool_), (k % per_row * side, k // per_row * side)) for k in range(count)]


def finished(masks: list[Mask], size_wh: tuple[int, int] = (64, 48)) -> Result:
    """The result of a task that found these masks."""
    image = SourceImage(np.zeros((1, 1, 3), dtype=np.uint8), "h", "photo.jpg")
    return result(Job("t", None, image), [Instance(mask, "thing") for mask in masks], size_wh, FACTS)


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


@given(MASKS, OFFSETS, st.integers(0, 3))
def test_run_lengths_are_those_of_pycocotools(mask_hw: MaskHW, offset_xy: tuple[int, int], margin: int) -> None:
    image_hw = placed(mask_hw, offset_xy, margin)
    assert segmentation(pack(mask_hw, offset_xy), (image_hw.shape[1], image_hw.shape[0])) == coco_rle(image_hw)


@given(MASKS, OFFSETS, st.integers(0, 3))
def test_run_lengths_read_back_are_the_mask(mask_hw: MaskHW, offset_xy: tuple[int, int], margin: int) -> None:
    image_hw = placed(mask_hw, offset_xy, margin)
    height, width = image_hw.shape
    for rle in (coco_rle(image_hw), {"size": [height, width], "counts": counts_of(pack(image_hw), (width, height)).tolist()}):
        mask = mask_of(rle, (width, height))
        assert (mask.window_hw((0, 0, width, height)) == image_hw).all()


@given(st.lists(st.integers(0, 2**31), min_size=1))
def test_compressed_run_lengths_expand_to_themselves(counts: list[int]) -> None:
    assert expanded(compressed(counts)) == counts


def test_a_large_noisy_mask_has_the_run_lengths_of_pycocotools() -> None:
    mask_hw = np.random.default_rng(3).random((700, 900)) > 0.5
    assert segmentation(pack(mask_hw), (900, 700)) == coco_rle(mask_hw)


@given(st.lists(st.tuples(MASKS, OFFSETS), max_size=20), st.integers(1, 20), st.integers(1, 20))
def test_pillow_reads_the_ids_back_with_the_small_masks_on_top(
    parts: list[tuple[MaskHW, tuple[int, int]]], width: int, height: int
) -> None:
    size_wh = (width + 20, height + 20)
    masks = [pack(mask_hw, offset_xy) for mask_hw, offset_xy in parts]
    image = opened(mask_png(masks, colours(len(masks)), size_wh))
    expected_hw = np.zeros((size_wh[1], size_wh[0]), dtype=np.uint8)
    for index in sorted(range(len(masks)), key=lambda index: -masks[index].area):
        expected_hw[masks[index].window_hw((0, 0, *size_wh))] = index + 1
    assert image.mode == "P"
    assert (np.asarray(image) == expected_hw).all()


@pytest.mark.parametrize("count", [0, 1, 3, 4, 15, 16, 255])
def test_every_depth_holds_its_ids_and_their_colours(count: int) -> None:
    palette = colours(count)
    image = opened(mask_png(squares(count, (64, 48), 3), palette, (64, 48)))
    assert np.unique(np.asarray(image)).tolist() == list(range(count + 1))
    rgba_hwc = np.asarray(image.convert("RGBA"))
    assert tuple(rgba_hwc[-1, -1]) == (0, 0, 0, 0)
    assert [tuple(rgba_hwc[k // 21 * 3, k % 21 * 3]) for k in range(count)] == [(*colour, 255) for colour in palette]


def test_above_255_masks_the_png_holds_unique_colours_and_a_transparent_background() -> None:
    palette = colours(300)
    image = opened(mask_png(squares(300, (64, 48), 2), palette, (64, 48)))
    rgba_hwc = np.asarray(image)
    assert image.mode == "RGBA"
    assert [tuple(rgba_hwc[k // 32 * 2, k % 32 * 2]) for k in range(300)] == [(*colour, 255) for colour in palette]
    assert tuple(rgba_hwc[-1, -1]) == (0, 0, 0, 0)


def test_colours_are_unique_never_black_and_always_those_of_their_id() -> None:
    many = colours(5000)
    assert len(set(many)) == 5000
    assert (0, 0, 0) not in many
    assert colours(7) == many[:7]


def test_the_first_colours_lie_far_apart() -> None:
    first = np.array(colours(12), dtype=np.float64)
    apart = np.linalg.norm(first[:, None] - first[None], axis=-1) + np.eye(12) * 1000
    assert apart.min() > 50


def test_pycocotools_reads_the_dataset(tmp_path: Any, capsys: pytest.CaptureFixture[str]) -> None:
    masks = [pack(np.random.default_rng(k).random((20, 30)) > 0.4, (k, 2 * k)) for k in range(3)]
    file = tmp_path / "masks.json"
    file.write_bytes(finished(masks).blobs[1].data)
    coco = COCO(str(file))
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=[1]))
    for mask, annotation in zip(masks, annotations, strict=True):
        assert (coco.annToMask(annotation).astype(bool) == mask.window_hw((0, 0, 64, 48))).all()
        assert coco_mask.area(annotation["segmentation"]) == annotation["area"] == mask.area
        assert coco_mask.toBbox(annotation["segmentation"]).tolist() == annotation["bbox"]


def test_an_annotation_has_the_scores_that_the_model_gave_and_no_others() -> None:
    plain, scored = (
        pack(np.ones((2, 2), np.bool_), score=0.5),
        pack(np.ones((2, 2), np.bool_), score=0.7, predicted_iou=0.9, stability_score=0.8),
    )
    first, second = json.loads(finished([plain, scored]).blobs[1].data)["annotations"]
    assert "predicted_iou" not in first
    assert (second["score"], second["predicted_iou"], second["stability_score"]) == (0.7, 0.9, 0.8)


def test_a_square_has_a_polygon_of_four_corners() -> None:
    square = pack(np.ones((10, 20), dtype=np.bool_), (5, 3))
    (annotation,) = json.loads(finished([square]).blobs[1].data)["annotations"]
    (ring,) = annotation["polygons"]
    corners = {(ring[k], ring[k + 1]) for k in range(0, len(ring), 2)}
    assert corners == {(5.5, 3.5), (24.5, 3.5), (24.5, 12.5), (5.5, 12.5)}


def test_nothing_found_is_an_empty_mask_and_no_confidence() -> None:
    nothing = finished([])
    assert not np.asarray(opened(nothing.blobs[0].data)).any()
    assert json.loads(nothing.blobs[1].data)["annotations"] == []
    assert (nothing.labels, nothing.metadata["count"], nothing.metadata["confidence"]) == ([], 0, None)


def test_labels_that_would_not_fit_are_cut_to_the_best_with_a_warning() -> None:
    masks = [pack(np.ones((2, 2), np.bool_), (k % 60, k // 60), score=k / 1000) for k in range(1000)]
    many = finished(masks)
    assert len(json.dumps(many.labels).encode()) <= LABELS_BYTES_MAX
    assert 400 < len(many.labels) < 1000
    assert {entry["id"] for entry in many.labels} == set(range(1001 - len(many.labels), 1001))
    assert f"the {len(many.labels)} best of 1000" in many.metadata["warnings"][0]


def test_100_masks_at_12_megapixels_need_less_than_40_megabytes() -> None:
    ys, xs = np.ogrid[:800, :800]
    disc_hw = (xs - 400) ** 2 + (ys - 400) ** 2 <= 400**2
    masks = [pack(disc_hw, (k % 10 * 350, k // 10 * 240)) for k in range(100)]
    tracemalloc.start()
    try:
        finished(masks, (4000, 3000))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 40e6


def test_ids_need_a_byte_a_pixel_up_to_255_masks() -> None:
    assert painted(squares(255, (64, 48), 3), (64, 48)).dtype == np.uint8
