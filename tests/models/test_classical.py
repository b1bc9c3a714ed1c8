"""The classical engine: masks that fit clear objects, obey every point, and are the same every time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.engines import embedded, everything, segmented
from support.photos import COFFEE_BOX, FACE_POINT, photo

from models.base import Embedding, EverythingOptions, ImageHWC, Mask, Prompt, StoppedError, pack
from models.classical import Classical
from models.masks import mask_iou

ENGINE = Classical()
SIDES = st.integers(1, 60)


@pytest.fixture(scope="module")
def coffee() -> Embedding:
    return embedded(ENGINE, photo("coffee"))


def scene(size: int = 800) -> tuple[ImageHWC, Mask]:
    """A red disc on noisy blue, and the disc as a mask."""
    ys, xs = np.ogrid[:size, :size]
    disc_hw = (xs - 0.4 * size) ** 2 + (ys - 0.5 * size) ** 2 <= (0.2 * size) ** 2
    noise_hwc = np.random.default_rng(1).integers(0, 30, (size, size, 3))
    image_hwc = np.where(disc_hw[..., None], (200, 40, 40), (40, 60, 180)) + noise_hwc
    return image_hwc.astype(np.uint8), pack(disc_hw)


def best(embedding: Embedding, prompt: Prompt, multimask: bool | None = None) -> Mask:
    [masks] = segmented(ENGINE, embedding, [prompt], multimask)
    return masks[0]


def inside(mask: Mask, x: float, y: float) -> bool:
    return bool(mask.window_hw((int(x), int(y), int(x) + 1, int(y) + 1))[0, 0])


@pytest.mark.parametrize("size", [80, 800, 2000])
@pytest.mark.parametrize("way", ["box", "point", "mask"])
def test_a_clear_object_is_found_to_the_edge(size: int, way: str) -> None:
    image_hwc, disc = scene(size)
    x0, y0, x1, y1 = disc.box_xyxy
    rough = pack(np.ones((y1 - y0, x1 - x0), dtype=np.bool_), (x0, y0))
    prompts = {
        "box": Prompt(box_xyxy=(x0 - 2, y0 - 2, x1 + 2, y1 + 2)),
        "point": Prompt(points_xy=((0.35 * size, 0.5 * size),), labels=(1,)),
        "mask": Prompt(mask=rough),
    }
    assert mask_iou(best(embedded(ENGINE, image_hwc), prompts[way]), disc) > 0.95


def test_the_cup_and_its_saucer_fill_their_box(coffee: Embedding) -> None:
    mask = best(coffee, Prompt(box_xyxy=COFFEE_BOX))
    assert np.abs(np.array(mask.box_xyxy) - COFFEE_BOX).max() < 20
    assert 0.6 < mask.area / ((480 - 70) * (385 - 10)) < 0.85


def test_a_point_on_a_face_finds_no_more_than_the_head() -> None:
    mask = best(embedded(ENGINE, photo("astronaut")), Prompt(points_xy=(FACE_POINT,), labels=(1,)))
    x0, _, x1, y1 = mask.box_xyxy
    assert x0 > 100
    assert x1 < 340
    assert y1 < 320
    assert mask.area > 4000


def test_nothing_lies_outside_the_box(coffee: Embedding) -> None:
    x0, y0, x1, y1 = best(coffee, Prompt(box_xyxy=(165, 10, 425, 310))).box_xyxy
    assert x0 >= 163
    assert y0 >= 8
    assert x1 <= 427
    assert y1 <= 312


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 599.9), st.floats(0, 399.9), st.booleans()), min_size=1, max_size=6))
def test_foreground_points_are_inside_and_background_points_never(
    coffee: Embedding, points: list[tuple[float, float, bool]]
) -> None:
    apart = {(int(x), int(y)): (x, y, label) for x, y, label in [*points, (300.5, 150.5, True)]}
    prompt = Prompt(
        points_xy=tuple((x, y) for x, y, _ in apart.values()), labels=tuple(int(label) for *_, label in apart.values())
    )
    [masks] = segmented(ENGINE, coffee, [prompt], True)
    assert all(inside(mask, x, y) == label for mask in masks for x, y, label in apart.values())


def test_a_background_point_holds_beside_a_box_too(coffee: Embedding) -> None:
    prompt = Prompt(points_xy=((300, 150),), labels=(0,), box_xyxy=COFFEE_BOX)
    assert not inside(best(coffee, prompt), 300, 150)


@pytest.mark.parametrize(("multimask", "count"), [(True, 3), (False, 1), (None, 1)])
def test_multimask_gives_three_and_else_the_best_of_them(coffee: Embedding, multimask: bool | None, count: int) -> None:
    prompt = Prompt(points_xy=((280, 150),), labels=(1,))
    [masks] = segmented(ENGINE, coffee, [prompt], multimask)
    [three] = segmented(ENGINE, coffee, [prompt], True)
    assert len(masks) == count
    assert masks[0].score == three[0].score == max(mask.score for mask in three)


def test_the_same_question_has_the_same_answer_on_every_thread(coffee: Embedding) -> None:
    prompts = [Prompt(box_xyxy=COFFEE_BOX), Prompt(points_xy=((280, 150),), labels=(1,))]

    def answer(_: int) -> list[bytes]:
        found = segmented(ENGINE, embedded(ENGINE, photo("coffee")), prompts, True)
        return [mask.bits.tobytes() for masks in found for mask in masks]

    with ThreadPoolExecutor(3) as threads:
        first, *others = threads.map(answer, range(4))
    assert all(other == first for other in others)


def test_the_order_of_prompts_does_not_matter(coffee: Embedding) -> None:
    one, other = Prompt(box_xyxy=COFFEE_BOX), Prompt(points_xy=((280, 150),), labels=(1,))
    [[a], [b]] = segmented(ENGINE, coffee, [one, other], None)
    [[d], [c]] = segmented(ENGINE, coffee, [other, one], None)
    assert (a.bits.tobytes(), b.bits.tobytes()) == (c.bits.tobytes(), d.bits.tobytes())


@settings(max_examples=12, deadline=None)
@given(SIDES, SIDES, st.integers(0, 3))
def test_images_of_any_size_and_content_have_an_answer(width: int, height: int, levels: int) -> None:
    noise_hwc = np.random.default_rng(levels).integers(0, levels + 1, (height, width, 3)) * 60
    embedding = embedded(ENGINE, noise_hwc.astype(np.uint8))
    prompts = [Prompt(box_xyxy=(0, 0, width, height)), Prompt(points_xy=((width - 0.5, height - 0.5),), labels=(1,))]
    found = segmented(ENGINE, embedding, prompts, True)
    assert [len(masks) for masks in found] == [3, 3]
    assert all(mask.box_xyxy[2] <= width and mask.box_xyxy[3] <= height for masks in found for mask in masks)


def test_an_embedding_knows_its_own_size() -> None:
    embedding = embedded(ENGINE, np.zeros((3000, 2000, 3), dtype=np.uint8))
    sight_bytes = 1024 * 683 * 3
    assert sight_bytes < embedding.nbytes < 2 * sight_bytes


def test_everything_comes_largest_first_and_respects_its_options(coffee: Embedding) -> None:
    areas = [mask.area for mask in everything(ENGINE, coffee, EverythingOptions(points_per_side=4, min_mask_area=500))]
    assert areas == sorted(areas, reverse=True)
    assert 3 <= len(areas) <= 16
    assert min(areas) >= 500


def test_everything_finds_the_objects_of_a_clear_scene() -> None:
    image_hwc, disc = scene()
    masks = everything(ENGINE, embedded(ENGINE, image_hwc), EverythingOptions())
    assert max(mask_iou(mask, disc) for mask in masks) > 0.95


def test_the_engine_claims_no_confidence_that_it_does_not_have(coffee: Embedding) -> None:
    masks = everything(ENGINE, coffee, EverythingOptions())
    assert {(mask.predicted_iou, mask.stability_score) for mask in masks} == {(None, None)}
    assert all(0 <= mask.score <= 1 for mask in masks)


def test_work_stops_between_objects(coffee: Embedding) -> None:
    asked = []

    def stop() -> None:
        asked.append(1)
        if len(asked) == 2:
            raise StoppedError

    with pytest.raises(StoppedError):
        segmented(ENGINE, coffee, [Prompt(box_xyxy=COFFEE_BOX)] * 5, None, stop)
    assert len(asked) == 2
