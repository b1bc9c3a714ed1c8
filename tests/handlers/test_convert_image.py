"""Converting: format, size, transparency and profile of what comes out, read back as any reader would."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.kinds import NO_ENGINE, blob, done, models_of
from support.pictures import saved

from handlers import convert_image
from handlers._images_out import SIDES_MAX, Picture, encoded
from handlers.base import Job, Limits, RejectedError, Request, Result, SourceImage
from storage.images import decode

MODELS = models_of(NO_ENGINE)
PIXELS = np.random.default_rng(3).integers(0, 256, (30, 40, 3), dtype=np.uint8)
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def of_file(data: bytes) -> SourceImage:
    """An uploaded file as fetch hands it over."""
    image = decode(data, bytes_max=10**7, pixels_max=10**6)
    return SourceImage(image.pixels_hwc, image.content_hash, "a", image.alpha_hw, image.icc_profile, image.format)


def parsed(**params: Any) -> Any:
    return convert_image.parse(Request("convert_image", "a.jpg", None, params), Limits())


def converted(source: SourceImage, **params: Any) -> Result:
    return done(convert_image, Job("task", parsed(**params), source), MODELS)


def opened(result: Result) -> Image.Image:
    image = Image.open(io.BytesIO(blob(result, "result_image_url")))
    image.load()
    return image


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("own", ["PNG", "JPEG", "WEBP", "BMP", "TIFF"])
def test_every_format_becomes_every_format(own: str, format: str) -> None:
    smooth = Image.linear_gradient("L").resize((40, 30)).convert("RGB")
    result = converted(of_file(saved(smooth, own)), format=format, quality=95)
    image = opened(result)
    assert (image.format, image.mode, image.size) == (format, "RGB", (40, 30))
    assert np.abs(np.asarray(image, dtype=int) - np.asarray(smooth, dtype=int)).max() < 12
    assert (result.labels, result.metadata["format"], result.blobs[0].column) == ([], format, "result_image_url")


@pytest.mark.parametrize(("own", "format"), [("JPEG", "JPEG"), ("WEBP", "WEBP"), ("PNG", "PNG"), ("TIFF", "PNG"), ("BMP", "PNG")])
def test_left_out_the_format_is_the_images_own_or_png(own: str, format: str) -> None:
    assert opened(converted(of_file(saved(Image.fromarray(PIXELS), own)))).format == format


def test_png_gives_exactly_the_pixels_that_went_in() -> None:
    assert (np.asarray(opened(converted(of_file(saved(Image.fromarray(PIXELS), "PNG"))))) == PIXELS).all()


@pytest.mark.parametrize(
    ("size", "max_side", "expected"),
    [
        ((40, 30), 20, (20, 15)),
        ((30, 40), 20, (15, 20)),
        ((40, 30), 40, (40, 30)),
        ((40, 30), 8192, (40, 30)),
        ((40, 30), 1, (1, 1)),
        ((400, 1), 20, (20, 1)),
        ((33, 31), 32, (32, 30)),
    ],
)
def test_the_longer_side_becomes_at_most_max_side_and_nothing_grows(
    size: tuple[int, int], max_side: int, expected: tuple[int, int]
) -> None:
    result = converted(SourceImage(np.zeros((size[1], size[0], 3), dtype=np.uint8), "h", "a"), max_side=max_side)
    assert opened(result).size == expected
    metadata = result.metadata
    assert (metadata["image_width"], metadata["image_height"]) == size
    assert (metadata["result_width"], metadata["result_height"]) == expected


def seen_on(image: Image.Image, ground: int) -> Any:
    """A transparent image as it looks on a ground of one grey."""
    return np.asarray(
        Image.alpha_composite(Image.new("RGBA", image.size, (ground,) * 3 + (255,)), image).convert("RGB"), dtype=int
    )


@pytest.mark.parametrize("ground", [0, 90, 255])
def test_half_transparent_pixels_look_the_same_on_any_ground(ground: int) -> None:
    alpha_hw = np.random.default_rng(4).integers(0, 256, PIXELS.shape[:2], dtype=np.uint8)
    original = Image.fromarray(np.dstack([PIXELS, alpha_hw]))
    result = opened(converted(of_file(saved(original, "PNG"))))
    assert (np.asarray(result)[..., 3] == alpha_hw).all()
    assert np.abs(seen_on(result, ground) - seen_on(original, ground)).max() <= 2


def test_a_smaller_copy_does_not_mix_in_the_colours_of_transparent_pixels() -> None:
    pixels = np.zeros((4, 4, 4), dtype=np.uint8)
    pixels[:, ::2] = (0, 200, 0, 255)
    pixels[:, 1::2] = (255, 0, 0, 0)
    image = opened(converted(of_file(saved(Image.fromarray(pixels), "PNG")), max_side=2))
    assert np.abs(np.asarray(image, dtype=int) - (0, 200, 0, 128)).max() <= 2


def test_jpeg_lays_what_is_transparent_on_white_and_says_so() -> None:
    result = converted(of_file(saved(Image.new("RGBA", (8, 8), (0, 0, 0, 0)), "PNG")), format="JPEG")
    assert (np.asarray(opened(result)) == 255).all()
    assert result.metadata["warnings"] == ["JPEG has no transparency: what was transparent is laid on white"]


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_colour_profile_goes_along(format: str) -> None:
    source = of_file(saved(Image.fromarray(PIXELS), "PNG", icc_profile=PROFILE))
    assert opened(converted(source, format=format, max_side=20)).info["icc_profile"] == PROFILE


def test_orientation_is_applied_and_not_written_again() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    image = opened(converted(of_file(saved(Image.fromarray(PIXELS), "JPEG", exif=exif))))
    assert (image.size, image.getexif().get(0x0112)) == ((30, 40), None)


@pytest.mark.parametrize("side_max", [0, 8193])
def test_a_side_that_cannot_be_is_answered_with_what_to_change(side_max: int) -> None:
    with pytest.raises(RejectedError, match=r"max_side.*(1|8192)\.") as caught:
        parsed(max_side=side_max)
    assert caught.value.code == "params_invalid"


def test_what_a_format_cannot_hold_is_refused_unless_it_is_made_smaller() -> None:
    wide = SourceImage(np.zeros((2, 16_384, 3), dtype=np.uint8), "h", "a")
    with pytest.raises(RejectedError, match="WEBP holds at most 16383 pixels a side, and the image would have 16384"):
        convert_image.prepare(Job("task", parsed(format="webp"), wide), MODELS)
    assert opened(converted(wide, format="webp", max_side=8192)).size == (8192, 1)


@pytest.mark.parametrize(("name", "side"), SIDES_MAX.items())
def test_the_largest_side_of_each_format_is_written(name: Any, side: int) -> None:
    picture = Picture(np.zeros((1, side, 3), dtype=np.uint8), None, None)
    assert Image.open(io.BytesIO(encoded(picture, name, 50))).size == (side, 1)
