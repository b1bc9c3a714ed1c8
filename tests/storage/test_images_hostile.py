"""What becomes of bytes that are no image, half an image, or an image made to do harm: one sentence and nothing else."""

from __future__ import annotations

import subprocess
import sys
import threading
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFile
from support.pictures import BROKEN_EXIF, PHOTO, bmp, exif_of, flag, heic_header, jpeg, png, saved, tiff, webp

from storage.base import InvalidImageError
from storage.images import HEIC_READABLE, PIXELS_CEILING, DecodedImage, decode, shape_of

pytestmark = pytest.mark.filterwarnings(r"ignore:::PIL\.")
"""As at run time, where storage.images turns them off."""

BYTES_MAX, PIXELS_MAX = 50_000_000, 1_000_000


def read(data: bytes, pixels_max: int = PIXELS_MAX) -> DecodedImage:
    return decode(data, bytes_max=BYTES_MAX, pixels_max=pixels_max)


def refused(data: bytes, code: str = "image_invalid", pixels_max: int = PIXELS_MAX) -> str:
    """The sentence of the refusal, which must be one."""
    with pytest.raises(InvalidImageError) as caught:
        read(data, pixels_max)
    assert caught.value.code == code
    assert caught.value.message.endswith(".")
    assert "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pixels_are_refused_saying_what_to_save(dtype: type) -> None:
    assert "8 or 16 bits" in refused(saved(Image.fromarray(np.zeros((2, 2), dtype=dtype)), "TIFF"))


def test_lab_pixels_are_refused_saying_what_to_save() -> None:
    assert "RGB" in refused(saved(Image.new("LAB", (2, 2)), "TIFF"))


@pytest.mark.skipif(HEIC_READABLE, reason="pillow-heif is installed")
@pytest.mark.parametrize("brand", [b"heic", b"heix", b"mif1"])
def test_heic_without_pillow_heif_is_refused_by_name(brand: bytes) -> None:
    assert "pillow-heif" in refused(heic_header(brand))


@pytest.mark.skipif(not HEIC_READABLE, reason="pillow-heif is not installed")
def test_a_heic_that_is_nothing_but_a_header_is_refused() -> None:
    refused(heic_header())


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP", "BMP", "TIFF"])
def test_a_truncated_image_is_refused(format: str) -> None:
    pixels = np.random.default_rng(2).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = saved(Image.fromarray(pixels), format)
    for share in (0.1, 0.5, 0.9):
        refused(data[: int(len(data) * share)])


def test_a_jpeg_cut_short_is_called_so() -> None:
    data = PHOTO.read_bytes()
    assert "cut short" in refused(data[: len(data) // 2])


def with_scans(count: int) -> bytes:
    """A progressive JPEG that repeats its last scan until it has `count`."""
    data = saved(flag(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (count - data.count(b"\xff\xda") + 1) + data[-2:]


def test_a_jpeg_of_very_many_scans_is_refused_before_it_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(with_scans(100)).format == "JPEG"
    monkeypatch.setattr(ImageFile.ImageFile, "load", None)
    assert refused(with_scans(101)) == "The image has too many scans; save it again."


def test_a_jpeg_of_very_many_segments_is_refused() -> None:
    data = saved(flag(), "JPEG")
    assert "too many scans" in refused(data[:2] + b"\xff\xfe\0\4\xff\xda" * 10_000 + data[2:])


def test_what_a_camera_puts_before_or_behind_a_jpeg_counts_for_no_scan() -> None:
    data, film = saved(flag(), "JPEG"), b"\xff\xda" * 1000
    assert read(data + film).format == "JPEG"
    assert read(data[:2] + b"\xff\xef\x07\xd2" + film + data[2:]).format == "JPEG"


@pytest.mark.parametrize(
    "data", [b"hello", b"\0" * 1000, b"<html><body>404</body></html>", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"BM"]
)
def test_what_is_no_image_is_refused_naming_the_formats(data: bytes) -> None:
    assert "send an intact JPEG, PNG, WEBP, BMP" in refused(data)


def test_an_empty_file_is_called_so() -> None:
    assert "empty" in refused(b"")


@pytest.mark.parametrize(
    ("data", "name"),
    [(b"GIF89a" + b"\0" * 20, "GIF"), (b"%PDF-1.7", "PDF"), (b"<svg xmlns=''/>", "SVG"), (heic_header(b"avif"), "AVIF")],
)
def test_well_known_formats_that_are_not_read_are_named(data: bytes, name: str) -> None:
    assert refused(data).startswith(f"{name} is not read")


@pytest.mark.parametrize("format", ["GIF", "PPM", "TGA", "ICO", "PCX", "ICNS", "JPEG2000", "EPS", "DDS"])
def test_other_formats_that_pillow_knows_are_never_opened(format: str) -> None:
    refused(saved(flag(32, 32), format))


IDAT = (b"IDAT", zlib.compress(b"\0" * 1000))
BOMBS = {
    "png": png(30_000, 30_000, IDAT),
    "png of 10 megapixels": png(5_000, 2_000, IDAT),
    "png of 120 megapixels": png(12_000, 10_000, IDAT),
    "png beyond all bounds": png(2**31 - 1, 2**31 - 1, IDAT),
    "jpeg": jpeg(65_000, 65_000),
    "bmp": bmp(30_000, 30_000),
    "bmp from the top": bmp(30_000, -30_000),
    "tiff": tiff(30_000, 30_000),
    "webp": webp(16_383, 16_383),
    "webp canvas": webp(1 << 24, 250),
}


@pytest.mark.parametrize("data", BOMBS.values(), ids=BOMBS.keys())
def test_a_bomb_is_refused_by_its_header_in_an_instant(data: bytes) -> None:
    assert "smaller" in refused(data, "image_too_large")
    with pytest.raises(InvalidImageError) as caught:
        shape_of(data, bytes_max=BYTES_MAX, pixels_max=PIXELS_MAX)
    assert caught.value.code == "image_too_large"


def test_nothing_is_decoded_before_the_size_is_known_to_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", explode)
    refused(saved(flag(), "PNG"), "image_too_large", pixels_max=48 * 32 - 1)
    assert shape_of(saved(flag(), "PNG"), bytes_max=BYTES_MAX, pixels_max=48 * 32) == (32, 48, 3)


def test_the_limit_itself_is_allowed() -> None:
    data = saved(flag(), "PNG")
    assert read(data, 48 * 32).pixels_hwc.shape == (32, 48, 3)
    assert decode(data, bytes_max=len(data), pixels_max=PIXELS_MAX).format == "PNG"


def test_too_many_bytes_are_refused_before_they_are_looked_at() -> None:
    with pytest.raises(InvalidImageError) as caught:
        decode(b"x" * 101, bytes_max=100, pixels_max=PIXELS_MAX)
    assert caught.value.code == "image_too_large"
    assert caught.value.message == "The file has 101 bytes; at most 100 bytes are accepted: send a smaller one."


def test_a_limit_between_pillows_warning_and_its_bound_is_possible_but_none_above() -> None:
    assert shape_of(png(12_000, 10_000, IDAT), bytes_max=BYTES_MAX, pixels_max=PIXELS_CEILING) == (10_000, 12_000, 3)
    assert "178,956,970" in refused(png(30_000, 30_000, IDAT), "image_too_large", pixels_max=10**12)


@pytest.mark.filterwarnings("error::PIL.Image.DecompressionBombWarning")
def test_a_size_that_pillow_warns_of_is_too_large_even_where_warnings_are_errors() -> None:
    refused(png(12_000, 10_000, IDAT), "image_too_large")


def test_what_pillow_finds_odd_in_a_users_file_is_printed_nowhere(tmp_path: Path) -> None:
    (tmp_path / "broken-exif.jpg").write_bytes(saved(flag(), "JPEG", exif=BROKEN_EXIF))
    (tmp_path / "large.png").write_bytes(png(12_000, 10_000, IDAT))
    script = f"""if True:
        from pathlib import Path
        from storage.images import shape_of
        for path in sorted(Path({str(tmp_path)!r}).iterdir()):
            print(*shape_of(path.read_bytes(), bytes_max=10**6, pixels_max=10**8 + 10**8))
    """
    answer = subprocess.run([sys.executable, "-W", "default", "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout == "32 48 3\n10000 12000 3\n"
    assert answer.stderr == ""


def test_pillows_own_bound_is_left_as_it_is() -> None:
    assert Image.MAX_IMAGE_PIXELS == 89_478_485


def test_text_in_a_png_cannot_blow_up() -> None:
    blown = (b"zTXt", b"k\0\0" + zlib.compress(b"x" * 100_000_000))
    refused(png(1, 1, *[blown] * 2, (b"IDAT", zlib.compress(b"\0\0\0\0"))))


def test_a_profile_in_a_png_cannot_blow_up() -> None:
    blown = (b"iCCP", b"k\0\0" + zlib.compress(b"x" * 100_000_000))
    refused(png(1, 1, blown, (b"IDAT", zlib.compress(b"\0\0\0\0"))))


def test_threads_decode_side_by_side_alike() -> None:
    data, bomb = PHOTO.read_bytes(), png(30_000, 30_000, IDAT)
    expected = read(data).pixels_hwc

    def one(number: int) -> bool:
        if number % 3 == 0:
            return "smaller" in refused(bomb, "image_too_large")
        return np.array_equal(read(data).pixels_hwc, expected)

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(one, range(24)))


def test_decoding_lets_other_threads_run() -> None:
    """While one thread decodes, this one gets on: with the GIL held it could not before the decoder is done."""
    data = saved(Image.effect_noise((3000, 3000), 90).convert("RGB"), "PNG", compress_level=1)
    done, turns = threading.Event(), 0
    started = threading.Event()

    def work() -> None:
        started.set()
        read(data, 10**8)
        done.set()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(100)
    try:
        thread = threading.Thread(target=work)
        thread.start()
        started.wait()
        while not done.is_set():
            turns += 1
            done.wait(0.0001)
        thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert turns > 5


OUTCOMES = {"read", "image_invalid", "image_too_large"}


def outcome(data: bytes) -> str:
    """What comes of bytes: read, or the code of their refusal."""
    try:
        image = read(data)
    except InvalidImageError as error:
        return error.code
    return "read" if image.pixels_hwc.ndim == 3 else "not an image"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=300))
def test_random_bytes_raise_nothing_but_a_refusal(data: bytes) -> None:
    assert outcome(data) in OUTCOMES


SEEDS = {
    "jpeg": saved(flag(), "JPEG", exif=exif_of(6)),
    "png": saved(flag(), "PNG", exif=exif_of(6)),
    "palette": saved(flag().quantize(3), "PNG", transparency=b"\x80\0\xff"),
    "webp": saved(flag(), "WEBP", exif=exif_of(6)),
    "bmp": saved(flag(), "BMP"),
    "tiff": saved(flag(), "TIFF", compression="tiff_lzw", exif=exif_of(6)),
    "grey tiff": tiff(4, 4, bytes(32), bits=16),
}


@pytest.mark.parametrize("seed", SEEDS.values(), ids=SEEDS.keys())
@settings(max_examples=150, deadline=None)
@given(changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=8), cut=st.integers(0, 10**6))
def test_mutated_images_raise_nothing_but_a_refusal(seed: bytes, changes: list[tuple[int, int]], cut: int) -> None:
    data = bytearray(seed)
    for at, value in changes:
        data[at % min(len(data), 400)] = value
    if cut % 4 == 0:
        del data[cut % len(data) :]
    assert outcome(bytes(data)) in OUTCOMES
