"""Painting: the right colour at the right pixels, in order, and nothing else of the image changes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms
from support.kinds import NO_ENGINE, blob, done, models_of

from handlers import paint_masks
from handlers._colours import hex_of
from handlers._rle import segmentation
from handlers.base import Job, Limits, RejectedError, Request, Result, SourceImage
from models.base import StoppedError, pack

MODELS = models_of(NO_ENGINE)
WIDTH, HEIGHT = 16, 12
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
TASK = "0b0c6e5e-6f3f-4a52-9a0d-3a5a3a6d7b11"
PIXELS = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
PIXELS.setflags(write=False)
SQUARE = {"polygon": [[2, 3], [8, 3], [8, 9], [2, 9]]}
INSIDE = (slice(3, 9), slice(2, 8))
FAR = {"polygon": [[50, 50], [60, 50], [60, 60]]}


def source(**more: Any) -> SourceImage:
    return SourceImage(PIXELS, "h", "photo.png", **more)


def see_through() -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Alpha of every degree, none of it on the right half."""
    alpha_hw = np.full((HEIGHT, WIDTH), 255, dtype=np.uint8)
    alpha_hw[:, : WIDTH // 2] = np.linspace(0, 255, HEIGHT * WIDTH // 2).reshape(HEIGHT, -1)
    return alpha_hw


def parsed(params: Mapping[str, Any]) -> Any:
    return paint_masks.parse(Request("paint_masks", "a.jpg", None, params), Limits())


def painted(layers: Sequence[Any], image: SourceImage | None = None, **params: Any) -> Result:
    return done(paint_masks, Job("task", parsed({"layers": layers, **params}), image or source()), MODELS)


def opened(result: Result) -> Image.Image:
    image = Image.open(io.BytesIO(blob(result, "result_image_url")))
    image.load()
    return image


def refused(params: Mapping[str, Any]) -> str:
    with pytest.raises(RejectedError) as caught:
        parsed(params)
    assert caught.value.code == "params_invalid"
    return caught.value.message


@given(st.tuples(*[st.integers(0, 255)] * 3), st.floats(0, 1))
def test_a_layer_blends_to_the_nearest_level_inside_its_mask_and_nowhere_else(
    colour: tuple[int, int, int], opacity: float
) -> None:
    canvas_hwc = PIXELS.copy()
    mask_hw = np.random.default_rng(1).random((6, 6)) < 0.5
    paint_masks.paint(canvas_hwc, pack(mask_hw, (2, 3)), colour, opacity)
    exact = PIXELS.astype(float)
    exact[INSIDE] = np.where(mask_hw[..., None], exact[INSIDE] * (1 - opacity) + np.array(colour) * opacity, exact[INSIDE])
    assert np.abs(canvas_hwc - exact).max() <= 0.5 + 1e-9
    outside = np.ones((HEIGHT, WIDTH), dtype=bool)
    outside[INSIDE] = ~mask_hw
    assert (canvas_hwc[outside] == PIXELS[outside]).all()


def test_a_task_paints_a_png_of_the_same_size_and_leaves_the_source_as_it_is() -> None:
    before = PIXELS.copy()
    image = opened(painted([{"mask": SQUARE, "color": "#00F", "opacity": 1}]))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (WIDTH, HEIGHT))
    expected = PIXELS.copy()
    expected[INSIDE] = (0, 0, 255)
    assert (np.asarray(image) == expected).all()
    assert (before == PIXELS).all()


def test_left_out_a_layer_is_red_at_seven_tenths() -> None:
    named = painted([{"mask": SQUARE, "color": "#FF0000", "opacity": 0.7}])
    assert blob(painted([{"mask": SQUARE}]), "result_image_url") == blob(named, "result_image_url")


def test_later_layers_lie_on_earlier_ones() -> None:
    layers = [{"mask": SQUARE, "color": color, "opacity": 1} for color in ("#010203", "#a0B0c0")]
    assert np.asarray(opened(painted(layers)))[5, 5].tolist() == [160, 176, 192]


def test_the_layers_are_listed() -> None:
    layers = [{"mask": SQUARE, "color": "#0f8", "opacity": 0.25}, {"mask": FAR}]
    result = painted(layers)
    assert result.labels == [
        {"id": 1, "color": "#00FF88", "opacity": 0.25, "area": 36, "box": [2, 3, 8, 9]},
        {"id": 2, "color": "#FF0000", "opacity": 0.7, "area": 0, "box": [0, 0, 0, 0]},
    ]
    assert result.metadata["warnings"] == ["layer 2 painted nothing: its mask is empty"]
    assert (result.metadata["count"], result.metadata["format"], result.metadata["quality"]) == (2, "PNG", None)


def test_several_masks_of_a_task_are_painted_as_one() -> None:
    first, second = np.zeros((2, HEIGHT, WIDTH), dtype=bool)
    first[0:4, 0:4] = second[2:6, 2:6] = True
    rles = [segmentation(pack(mask_hw), (WIDTH, HEIGHT)) for mask_hw in (first, second)]
    dataset = {"annotations": [{"id": index + 1, "segmentation": rle} for index, rle in enumerate(rles)]}
    params = parsed({"layers": [{"mask": {"task_id": TASK}, "opacity": 0.5}]})
    (wanted,) = paint_masks.inputs(params).masks
    result = done(paint_masks, Job("task", params, source(), masks={wanted.name: dataset}), MODELS)
    expected = PIXELS.astype(int)
    expected[first | second] = np.rint(PIXELS[first | second] * 0.5 + np.array((255, 0, 0)) * 0.5)
    assert (np.asarray(opened(result)) == expected).all()
    assert result.labels[0]["area"] == 28


@pytest.mark.parametrize(
    ("format", "name", "file"), [("jpg", "JPEG", "jpg"), ("Jpeg", "JPEG", "jpg"), ("webp", "WEBP", "webp"), ("png", "PNG", "png")]
)
def test_every_format_is_taken_in_any_case(format: str, name: str, file: str) -> None:
    result = painted([{"mask": SQUARE}], format=format)
    assert opened(result).format == name
    assert (result.blobs[0].name, result.blobs[0].content_type) == (f"result.{file}", f"image/{name.lower()}")


def test_quality_says_how_small_a_file_becomes() -> None:
    pixels_hwc = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    image = SourceImage(pixels_hwc, "h", "a.jpg")
    for format in ("JPEG", "WEBP"):
        sizes = [
            len(blob(painted([{"mask": SQUARE}], image, format=format, quality=q), "result_image_url")) for q in (1, 50, 100)
        ]
        assert sizes == sorted(set(sizes))
    assert painted([{"mask": SQUARE}], format="JPEG").metadata["quality"] == 90
    assert painted([{"mask": SQUARE}], quality=5).metadata["warnings"] == ["quality was not applied: PNG loses nothing"]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_colour_profile_is_kept(format: str) -> None:
    assert opened(painted([{"mask": SQUARE}], source(icc_profile=PROFILE), format=format)).info["icc_profile"] == PROFILE
    assert "icc_profile" not in opened(painted([{"mask": SQUARE}], format=format)).info


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_transparency_stays_as_it_is(format: str) -> None:
    alpha_hw = see_through()
    image = opened(painted([{"mask": SQUARE}], source(alpha_hw=alpha_hw), format=format))
    assert image.mode == "RGBA"
    assert (np.asarray(image)[..., 3] == alpha_hw).all()


def test_jpeg_lays_what_is_transparent_on_white_and_says_so() -> None:
    alpha_hw = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    white = SourceImage(np.full_like(PIXELS, 255), "h", "a.png", alpha_hw)
    result = painted([{"mask": SQUARE, "opacity": 1}], white, format="JPEG")
    assert (np.asarray(opened(result)) == 255).all()
    assert result.metadata["warnings"] == ["JPEG has no transparency: what was transparent is laid on white"]


@pytest.mark.parametrize(
    "color", ["reddish", "#FF00", "FF0000", "#GG0000", "#FF0000FF", "#ff0000\n", [255, 0, 0], None, "x" * 999]
)
def test_what_is_no_colour_is_answered_with_how_one_is_written(color: Any) -> None:
    message = refused({"layers": [{"mask": SQUARE, "color": color}]})
    assert message.startswith('In layers[0].color: a colour is written "#FF0000" or "#F00", not "')
    assert len(message) < 120


@given(st.tuples(*[st.integers(0, 255)] * 3))
def test_a_colour_written_is_read_as_itself(colour: tuple[int, int, int]) -> None:
    assert parsed({"layers": [{"mask": SQUARE, "color": hex_of(colour)}]}).layers[0].color == colour


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({"layers": [{"mask": SQUARE, "opacity": 1.5}]}, "In layers[0].opacity: should be less than or equal to 1."),
        ({"layers": [{"mask": SQUARE, "opacity": -0.1}]}, "In layers[0].opacity: should be greater than or equal to 0."),
        ({"layers": [{"mask": SQUARE}], "quality": 0}, "In quality: should be greater than or equal to 1."),
        ({"layers": [{"mask": SQUARE}], "quality": 101}, "In quality: should be less than or equal to 100."),
        ({"layers": [{"mask": SQUARE}], "format": "gif"}, "In format: should be 'PNG', 'JPEG' or 'WEBP'."),
        ({"layers": []}, "In layers: list should have at least 1 item"),
        ({"layers": [{"mask": SQUARE}] * 101}, "There are 101 layers; at most 100 are allowed."),
        ({"layers": [{"mask": SQUARE, "colour": "#FFF"}]}, 'did you mean "color"?'),
    ],
)
def test_impossible_parameters_are_answered_with_what_to_change(params: Mapping[str, Any], says: str) -> None:
    assert says in refused(params)


def test_an_image_that_the_format_cannot_hold_is_refused_before_anything_is_painted() -> None:
    wide = SourceImage(np.zeros((1, 16_384, 3), dtype=np.uint8), "h", "a.png")
    job = Job("task", parsed({"layers": [{"mask": SQUARE}], "format": "WEBP"}), wide)
    with pytest.raises(RejectedError, match="WEBP holds at most 16383 pixels a side") as caught:
        paint_masks.prepare(job, MODELS)
    assert caught.value.code == "params_invalid"


def test_a_stop_is_heard_between_layers() -> None:
    calls = []

    def stop() -> None:
        calls.append(1)
        if len(calls) > 2:
            raise StoppedError

    job = Job("task", parsed({"layers": [{"mask": SQUARE}] * 9}), source())
    with pytest.raises(StoppedError):
        paint_masks.run([paint_masks.prepare(job, MODELS)], MODELS, stop)
