"""Everything mode: the same masks as by filtering at full resolution, in the order and with the thresholds that were asked."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import numpy.typing as npt
import pytest
from support.kinds import never_stop

from models.amg import HELD_BYTES_MAX, MASKS_MAX, Clicks, Points, Window, crop_boxes, everything, everywhere, grid, stability
from models.base import EverythingOptions, Mask, StoppedError, pack
from models.framing import Floats, Frame, fitted
from models.masks import mask_iou, nms

FRAME = fitted((300, 400), 1024, 256)
OPTIONS = EverythingOptions(points_per_side=8)


def blobs(points_xy: Points) -> tuple[Floats, Floats]:
    """A model that sees a disc around each click, a larger one, and something blurred: three answers with falling IoU."""
    line = np.arange(256, dtype=np.float32) + 0.5
    logits, ious = [], []
    for x, y in FRAME.points(points_xy) / 4:
        distance = np.hypot(line[None] - x, line[:, None] - y)
        radius = 5 + (7 * x + 13 * y) % 11
        logits.append([30 * (radius - distance), 30 * (2 * radius - distance), 0.2 * (radius - distance)])
        ious.append([0.99 - 0.001 * ((x + 3 * y) % 50), 0.9, 0.95])
    return np.array(logits, dtype=np.float32), np.array(ious, dtype=np.float32)


def slowly(clicks: Clicks, frame: Frame, options: EverythingOptions) -> list[Mask]:
    """The reference: every answer enlarged first, then judged at full resolution (segment-anything's mask generator)."""
    logits, ious = clicks(grid(options.points_per_side, frame.size_hw))
    (inner_h, inner_w), (height, width) = frame.inner_hw, frame.size_hw
    found = []
    for logits_hw, iou in zip(logits.reshape(-1, 256, 256), ious.ravel(), strict=True):
        square_hw = cv2.resize(logits_hw, (frame.side, frame.side), interpolation=cv2.INTER_LINEAR)
        full_hw = cv2.resize(square_hw[:inner_h, :inner_w], (width, height), interpolation=cv2.INTER_LINEAR)
        stable = (full_hw > 1).sum() / max((full_hw > -1).sum(), 1)
        if iou >= options.pred_iou_thresh and stable >= options.stability_score_thresh:
            found.append(pack(full_hw > 0, score=float(iou)))
    kept = nms(np.array([mask.box_xyxy for mask in found]), [mask.score for mask in found], options.box_nms_thresh)
    return [found[index] for index in kept]


@pytest.mark.parametrize("options", [OPTIONS, replace(OPTIONS, stability_score_thresh=0.9, box_nms_thresh=0.5)])
def test_the_masks_are_those_of_filtering_at_full_resolution(options: EverythingOptions) -> None:
    ours, theirs = everything(blobs, FRAME, options, 16, never_stop)(), slowly(blobs, FRAME, options)
    matched = sum(max(mask_iou(mask, other) for other in ours) >= 0.95 for mask in theirs)
    assert matched >= 0.95 * len(theirs) > 20
    assert abs(len(ours) - len(theirs)) <= 0.05 * len(theirs)


def test_masks_come_largest_first_with_their_scores() -> None:
    masks = everything(blobs, FRAME, OPTIONS, 16, never_stop)()
    areas = [mask.area for mask in masks]
    assert areas == sorted(areas, reverse=True)
    assert all(mask.score == mask.predicted_iou >= OPTIONS.pred_iou_thresh for mask in masks)
    assert all((mask.stability_score or 0) >= OPTIONS.stability_score_thresh for mask in masks)


def test_a_predicted_iou_that_nothing_reaches_leaves_nothing() -> None:
    assert everything(blobs, FRAME, replace(OPTIONS, pred_iou_thresh=1.0), 16, never_stop)() == []


def test_what_a_small_change_of_the_threshold_would_change_is_left_out() -> None:
    stable, all_of_them = (
        everything(blobs, FRAME, replace(OPTIONS, stability_score_thresh=least, box_nms_thresh=1), 16, never_stop)()
        for least in (0.95, 0.0)
    )
    assert len(stable) == 2 * 64
    assert len(all_of_them) == 3 * 64


def test_masks_below_the_least_area_are_left_out() -> None:
    masks = everything(blobs, FRAME, replace(OPTIONS, min_mask_area=800), 16, never_stop)()
    assert masks
    assert min(mask.area for mask in masks) >= 800


def test_the_size_of_a_batch_changes_nothing() -> None:
    one, many = (everything(blobs, FRAME, OPTIONS, batch, never_stop)() for batch in (1, 64))
    assert [mask.bits.tobytes() for mask in one] == [mask.bits.tobytes() for mask in many]


def test_a_tight_budget_of_memory_drops_duplicates_early_and_nothing_else() -> None:
    usual = everything(blobs, FRAME, OPTIONS, 8, never_stop)()
    tight = everything(blobs, FRAME, OPTIONS, 8, never_stop, held_bytes_max=1)()
    assert abs(len(tight) - len(usual)) <= 0.1 * len(usual)


def test_a_stop_is_heard_between_batches() -> None:
    asked: list[int] = []

    def stop() -> None:
        if len(asked) == 3:
            raise StoppedError

    def counted(points_xy: Points) -> tuple[Floats, Floats]:
        asked.append(len(points_xy))
        return blobs(points_xy)

    with pytest.raises(StoppedError):
        everything(counted, FRAME, OPTIONS, 10, stop)
    assert asked == [10, 10, 10]


def test_the_grid_covers_the_image_evenly() -> None:
    assert grid(2, (100, 200)).tolist() == [[50, 25], [150, 25], [50, 75], [150, 75]]


def test_a_mask_of_nothing_is_not_stable() -> None:
    assert stability(np.full((4, 4), -9, dtype=np.float32)) == 0.0
    assert stability(np.full((4, 4), 9, dtype=np.float32)) == 1.0


def test_crops_are_those_of_segment_anything() -> None:
    """Numbers of its generate_crop_boxes for an image of 600 x 400."""
    assert crop_boxes((400, 600), 0) == []
    assert crop_boxes((400, 600), 1) == [(0, 0, 368, 268), (0, 132, 368, 400), (232, 0, 600, 268), (232, 132, 600, 400)]
    second = crop_boxes((400, 600), 2)[4:]
    assert (len(second), second[0], second[-1]) == (16, (0, 0, 201, 151), (399, 249, 600, 400))
    assert all(x0 < x1 and y0 < y1 for x0, y0, x1, y1 in crop_boxes((1, 7), 3))


def disc(centre_xy: tuple[float, float], radius: float, box_xyxy: tuple[int, int, int, int]) -> tuple[Window, Clicks]:
    """A look through a window at one disc of the image, whatever is clicked."""
    x0, y0, x1, y1 = box_xyxy
    frame = Frame((y1 - y0, x1 - x0), (1024, 1024), 1024, 256)
    line = (np.arange(256) + 0.5) / 256
    distance = np.hypot(line[None] * (x1 - x0) + x0 - centre_xy[0], line[:, None] * (y1 - y0) + y0 - centre_xy[1])
    logits = (30 * (radius - distance)).astype(np.float32)[None, None]
    return Window(frame, (x0, y0)), lambda points_xy: (logits, np.full((1, 1), 0.9, dtype=np.float32))


WHOLE, LEFT = (0, 0, 400, 300), (0, 0, 240, 180)


def seen_through(*looks: tuple[Window, Clicks]) -> list[Mask]:
    return everywhere(looks, (300, 400), replace(OPTIONS, points_per_side=1), 1, never_stop)()


@pytest.mark.parametrize("box_xyxy", [WHOLE, LEFT, (60, 40, 400, 300)])
def test_a_mask_lies_in_the_image_where_its_window_shows_it(box_xyxy: tuple[int, int, int, int]) -> None:
    [mask] = seen_through(disc((130, 110), 40, box_xyxy))
    ys, xs = np.mgrid[:300, :400] + 0.5
    assert mask_iou(mask, pack(np.hypot(xs - 130, ys - 110) < 40)) > 0.98


def test_of_the_same_thing_in_two_windows_the_smaller_windows_mask_is_kept() -> None:
    for looks in ((WHOLE, LEFT), (LEFT, WHOLE)):
        [mask] = seen_through(*(disc((130, 90), 40 if box is LEFT else 44, box) for box in looks))
        assert mask.area == pytest.approx(np.pi * 40**2, rel=0.02)


def test_a_mask_that_a_crop_cuts_off_is_left_out_but_not_one_that_the_image_does() -> None:
    assert len(seen_through(disc((225, 90), 40, LEFT))) == 0
    assert len(seen_through(disc((10, 90), 40, LEFT))) == 1
    assert len(seen_through(disc((390, 90), 40, WHOLE))) == 1


def test_answers_may_be_fewer_than_clicks() -> None:
    assert (
        everything(lambda points_xy: (np.zeros((0, 1, 256, 256), np.float32), np.zeros((0, 1))), FRAME, OPTIONS, 8, never_stop)()
        == []
    )


def test_a_stop_is_heard_while_masks_are_enlarged() -> None:
    later = everything(blobs, FRAME, OPTIONS, 64, stopping := Stopping())
    stopping.now = True
    with pytest.raises(StoppedError):
        later()


class Stopping:
    """A Stop that raises from a moment on."""

    now = False

    def __call__(self) -> None:
        if self.now:
            raise StoppedError


def test_an_answer_has_so_many_masks_at_most_the_best_of_them() -> None:
    frame = fitted((64, 64), 64, 64)

    def clicks(points_xy: npt.NDArray[np.float64]) -> tuple[Floats, Floats]:
        logits = np.full((len(points_xy), 1, 64, 64), -5, dtype=np.float32)
        for index, (x, y) in enumerate(points_xy):
            logits[index, 0, int(y), int(x)] = 5
        ious = np.linspace(0.5, 1, len(points_xy), dtype=np.float32)[:, None]
        return logits, ious

    options = EverythingOptions(points_per_side=40, pred_iou_thresh=0, stability_score_thresh=0, box_nms_thresh=1)
    for held_bytes_max in (HELD_BYTES_MAX, 1):
        assert len(everything(clicks, frame, options, 1600, never_stop, held_bytes_max)()) == MASKS_MAX
