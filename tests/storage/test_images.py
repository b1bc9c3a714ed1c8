"""What becomes of the images that users upload: upright RGB, whatever format, mode and orientation they came in."""

from __future__ import annotations

import hashlib
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from support.pictures import BLACK, BLUE, BROKEN_EXIF, GREEN, PHOTO, RED, WHITE, close, exif_of, flag, png, saved, tiff

from storage.images import HEIC_READABLE, DecodedImage, decode, kept, shape_of, unkept

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
"""As at run time, where storage.images turns them off."""

BYTES_MAX, PIXELS_MAX = 50_000_000, 1_000_000


def read(data: bytes) -> DecodedImage:
    return decode(data, bytes_max=BYTES_MAX, pixels_max=PIXELS_MAX)


LOSSLESS = {"PNG": {}, "BMP": {}, "TIFF": {}, "WEBP": {"lossless": True}}


@pytest.mark.parametrize("format", LOSSLESS)
@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (3, 5), (33, 31), (640, 2)])
def test_a_lossless_format_gives_exactly_the_pixels_that_went_in(format: str, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = read(saved(Image.fromarray(pixels), format, **LOSSLESS[format]))
    assert np.array_equal(image.pixels_hwc, pixels)
    assert image.format == format


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"quality": 30}])
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (48, 32), (127, 65)])
def test_a_jpeg_of_any_making_is_read_at_full_size(options: dict[str, Any], size: tuple[int, int]) -> None:
    image = read(saved(flag(*size), "JPEG", **options))
    assert image.format == "JPEG"
    assert image.pixels_hwc.shape == (size[1], size[0], 3)


def test_the_array_is_contiguous_read_only_rgb_and_the_hash_that_of_the_bytes() -> None:
    data = PHOTO.read_bytes()
    image = read(data)
    assert image.pixels_hwc.shape == (300, 451, 3)
    assert image.pixels_hwc.dtype == np.uint8
    assert image.pixels_hwc.flags.c_contiguous
    assert not image.pixels_hwc.flags.writeable
    assert image.content_hash == hashlib.sha256(data).hexdigest()
    assert not image.had_alpha


TURNS = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}
"""How an upright image is laid down so that its orientation sets it upright again."""


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", TURNS)
def test_every_exif_orientation_comes_out_upright_in_every_format(format: str, orientation: int) -> None:
    turn = TURNS[orientation]
    laid = flag() if turn is None else flag().transpose(turn)
    data = saved(laid, format, exif=exif_of(orientation).tobytes() if format != "TIFF" else exif_of(orientation))
    image = read(data)
    assert close(image.pixels_hwc, flag())
    assert image.pixels_hwc.flags.c_contiguous
    assert shape_of(data, bytes_max=BYTES_MAX, pixels_max=PIXELS_MAX) == (32, 48, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_orientation_that_does_not_exist_turns_nothing(orientation: int) -> None:
    assert close(read(saved(flag(), "JPEG", exif=exif_of(orientation))).pixels_hwc, flag())


@pytest.mark.parametrize("exif", [b"Exif\0\0", b"Exif\0\0garbage", BROKEN_EXIF, b"x"])
def test_a_broken_exif_block_does_not_spoil_the_image(exif: bytes) -> None:
    assert close(read(saved(flag(), "JPEG", exif=exif)).pixels_hwc, flag())


def test_an_orientation_that_only_xmp_names_is_left_alone_as_browsers_do() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    assert close(read(saved(flag(), "JPEG", xmp=xmp)).pixels_hwc, flag())


def test_half_transparent_pixels_are_laid_on_white() -> None:
    image = Image.new("RGBA", (3, 1))
    image.putdata([(0, 0, 0, 255), (0, 0, 0, 0), (255, 0, 0, 128)])
    for format in ("PNG", "TIFF", "WEBP"):
        decoded = read(saved(image, format, **LOSSLESS[format]))
        assert decoded.had_alpha
        assert decoded.pixels_hwc[0].tolist() == [[0, 0, 0], [255, 255, 255], [255, 127, 127]]


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", TURNS)
def test_alpha_comes_along_upright_contiguous_and_read_only(format: str, orientation: int) -> None:
    alpha = Image.linear_gradient("L").resize((48, 32)).rotate(180)
    upright = flag().convert("RGBA")
    upright.putalpha(alpha)
    turn = TURNS[orientation]
    laid = upright if turn is None else upright.transpose(turn)
    data = saved(
        laid, format, exif=exif_of(orientation).tobytes() if format != "TIFF" else exif_of(orientation), **LOSSLESS[format]
    )
    image = read(data)
    assert image.alpha_hw is not None
    assert np.array_equal(image.alpha_hw, np.asarray(alpha))
    assert (image.alpha_hw.flags.c_contiguous, image.alpha_hw.flags.writeable) == (True, False)
    assert shape_of(data, bytes_max=BYTES_MAX, pixels_max=PIXELS_MAX) == (32, 48, 4)


def test_an_image_whose_every_pixel_is_opaque_has_no_alpha() -> None:
    image = read(saved(flag().convert("RGBA"), "PNG"))
    assert (image.alpha_hw, image.had_alpha) == (None, True)
    assert (read(saved(flag(), "PNG")).alpha_hw, read(saved(flag(), "JPEG")).alpha_hw) == (None, None)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_png_with_transparency_is_laid_on_white(mode: str) -> None:
    image = Image.new("RGBA", (2, 1), (0, 0, 0, 255))
    image.putpixel((1, 0), (255, 255, 255, 255))
    options: dict[str, Any] = {}
    if mode in ("LA", "RGBA"):
        image.putpixel((0, 0), (0, 0, 0, 0))
    else:
        options["transparency"] = {"1": 0, "L": 0, "RGB": (0, 0, 0), "P": image.convert("P").getpixel((0, 0))}[mode]
    data = saved(image.convert(mode), "PNG", **options)
    decoded = read(data)
    assert decoded.had_alpha
    assert decoded.alpha_hw is not None
    assert decoded.alpha_hw.tolist() == [[0, 255]]
    assert shape_of(data, bytes_max=BYTES_MAX, pixels_max=PIXELS_MAX) == (1, 2, 4)
    assert decoded.pixels_hwc.tolist() == [[[255, 255, 255], [255, 255, 255]]]


def test_a_palette_with_transparency_of_several_degrees_is_laid_on_white() -> None:
    image = Image.new("P", (3, 1))
    image.putpalette([*RED, *GREEN, *BLUE])
    image.putdata([0, 1, 2])
    decoded = read(saved(image, "PNG", transparency=bytes([255, 0, 128])))
    assert decoded.pixels_hwc[0].tolist() == [[255, 0, 0], [255, 255, 255], [127, 127, 255]]


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_an_opaque_palette_gives_its_colours(format: str) -> None:
    decoded = read(saved(flag().quantize(3), format))
    assert close(decoded.pixels_hwc, flag(), 0)
    assert not decoded.had_alpha


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "JPEG"])
def test_grey_becomes_three_equal_channels(format: str) -> None:
    grey = Image.linear_gradient("L")
    decoded = read(saved(grey, format, **({"quality": 100} if format == "JPEG" else {})))
    assert np.abs(decoded.pixels_hwc.astype(int) - np.asarray(grey, dtype=int)[..., None]).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF"])
def test_one_bit_becomes_black_and_white(format: str) -> None:
    image = Image.new("1", (9, 1))
    image.putpixel((8, 0), 1)
    decoded = read(saved(image, format))
    assert decoded.pixels_hwc[0].tolist() == [list(BLACK)] * 8 + [list(WHITE)]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_grey_of_16_bits_is_scaled_and_not_clipped(format: str) -> None:
    values = np.array([[0, 128, 256, 257, 32768, 65279, 65535]], dtype=np.uint16)
    decoded = read(saved(Image.fromarray(values), format))
    assert decoded.pixels_hwc[0, :, 0].tolist() == [0, 0, 1, 1, 128, 254, 255]


def test_16_bits_of_big_endian_tiff_are_scaled_alike() -> None:
    data = np.array([0, 32768, 65535], dtype=">u2").tobytes()
    decoded = read(tiff(3, 1, data, bits=16))
    assert decoded.pixels_hwc[0, :, 0].tolist() == [0, 128, 255]


def test_16_bit_tiff_that_calls_zero_white_is_turned_round() -> None:
    data = np.array([0, 32768, 65535], dtype="<u2").tobytes()
    decoded = read(tiff(3, 1, data, bits=16, photometric=0, order="<"))
    assert decoded.pixels_hwc[0, :, 0].tolist() == [255, 127, 0]


def test_16_bit_grey_with_a_transparent_value_is_laid_on_white() -> None:
    rows = b"\0" + np.array([1000, 0], dtype=">u2").tobytes()
    data = png(2, 1, (b"tRNS", struct.pack(">H", 1000)), (b"IDAT", zlib.compress(rows)), bits=16, colour=0)
    decoded = read(data)
    assert decoded.had_alpha
    assert decoded.pixels_hwc[0].tolist() == [list(WHITE), list(BLACK)]
    assert decoded.alpha_hw is not None
    assert decoded.alpha_hw.tolist() == [[0, 255]]


def test_colour_of_16_bits_is_scaled() -> None:
    rows = b"\0" + np.array([0, 32768, 65535], dtype=">u2").tobytes()
    decoded = read(png(1, 1, (b"IDAT", zlib.compress(rows)), bits=16))
    assert decoded.pixels_hwc[0, 0].tolist() == [0, 128, 255]


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk_keeps_its_colours_whether_stored_inverted_or_not(format: str) -> None:
    """Adobe's JPEG stores CMYK inverted, and so does Pillow's; TIFF does not."""
    cmyk = flag().convert("CMYK")
    data = saved(cmyk, format)
    assert (b"Adobe" in data) == (format == "JPEG")
    decoded = read(data)
    assert close(decoded.pixels_hwc, flag(), 40)


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_of_an_animation_the_first_frame_counts(format: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, GREEN)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:], **LOSSLESS[format])
    assert read(data).pixels_hwc[0, 0].tolist() == list(RED)


def test_an_mpo_is_read_as_the_jpeg_that_it_begins_with() -> None:
    data = saved(flag(), "MPO", save_all=True, append_images=[Image.new("RGB", (48, 32))])
    image = read(data)
    assert image.format == "JPEG"
    assert close(image.pixels_hwc, flag())


def test_an_rgb_profile_is_handed_on_and_a_grey_one_is_not() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert read(saved(flag(), "PNG", icc_profile=profile)).icc_profile == profile
    grey = profile[:16] + b"GRAY" + profile[20:]
    assert read(saved(flag().convert("L"), "JPEG", icc_profile=grey)).icc_profile is None
    assert read(saved(flag(), "PNG")).icc_profile is None


def test_a_profile_larger_than_any_honest_one_is_left_out() -> None:
    blown = b"\0" * 16 + b"RGB " + bytes(4_000_001)
    assert read(saved(flag(), "JPEG", icc_profile=blown)).icc_profile is None


@pytest.mark.skipif(not HEIC_READABLE, reason="pillow-heif is not installed")
@pytest.mark.parametrize("orientation", TURNS)
def test_heic_is_read_upright(orientation: int) -> None:
    turn = TURNS[orientation]
    laid = flag(64, 48) if turn is None else flag(64, 48).transpose(turn)
    data = saved(laid, "HEIF", exif=exif_of(orientation).tobytes(), quality=90)
    image = read(data)
    assert image.format == "HEIC"
    assert close(image.pixels_hwc, flag(64, 48))
    assert shape_of(data, bytes_max=BYTES_MAX, pixels_max=PIXELS_MAX) == (48, 64, 3)


@pytest.mark.parametrize(
    ("size_wh", "side", "reduced_wh"),
    [((4000, 3000), 1024, (1024, 768)), ((2049, 1), 1024, (1024, 1)), ((1301, 833), 1024, (1024, 656)), ((64, 48), 64, (64, 48))],
)
def test_an_image_is_reduced_to_a_long_side_and_never_enlarged(
    size_wh: tuple[int, int], side: int, reduced_wh: tuple[int, int]
) -> None:
    data = saved(flag(*size_wh), "PNG")
    small = decode(data, bytes_max=len(data), pixels_max=12_000_000, side_max=side)
    assert (small.pixels_hwc.shape[1], small.pixels_hwc.shape[0], small.size_wh) == (*reduced_wh, size_wh)


def test_what_is_kept_comes_back_to_the_bit() -> None:
    pixels_hwc = np.random.default_rng(0).integers(0, 256, (37, 51, 3), dtype=np.uint8)
    np.testing.assert_array_equal(unkept(kept(pixels_hwc)), pixels_hwc)
