"""What every blob store does, run over each of them: a folder, and a bucket of a real S3 server."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.s3 import S3Server, s3_server

from storage.base import BlobStore, InvalidImageError, MissingBlobError
from storage.files import FileBlobs
from storage.r2 import R2Blobs

BAD_KEYS = ["", "/absolute", "../outside", "a/../../outside", "a//b", "a/", "./a", "a\\b", "a\0b", "a\nb", "\ud800", "a" * 1025]


@dataclass(frozen=True, slots=True)
class Bucket:
    server: S3Server
    name: str
    blobs: R2Blobs


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    """One bucket, and one client of it, for all tests here: a client takes longer to make than most of them to run."""
    with s3_server() as server:
        name = server.make_bucket()
        yield Bucket(server, name, server.blobs(name))


@pytest.fixture(params=["files", "r2"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    """An empty store."""
    if request.param == "files":
        return FileBlobs(tmp_path / "blobs")
    bucket: Bucket = request.getfixturevalue("bucket")
    bucket.server.empty_bucket(bucket.name)
    return bucket.blobs


def test_a_blob_comes_back_as_it_was_put(blobs: BlobStore) -> None:
    data = bytes(range(256)) * 1000
    blobs.put("masks/p/t/mask.png", data, "image/png")
    assert blobs.get("masks/p/t/mask.png", len(data)) == data


def test_an_empty_blob_comes_back_empty(blobs: BlobStore) -> None:
    blobs.put("empty", b"", "application/octet-stream")
    assert blobs.get("empty", 0) == b""


def test_putting_the_same_blob_twice_is_harmless(blobs: BlobStore) -> None:
    for _ in range(2):
        blobs.put("a/b", b"same", "text/plain")
    assert blobs.get("a/b", 10) == b"same"
    assert blobs.list("", 10) == ["a/b"]


@pytest.mark.parametrize("key", ["absent", "folder", "folder/blob/below", "folder/" + "x" * 300])
def test_a_key_without_a_blob_is_missing(blobs: BlobStore, key: str) -> None:
    blobs.put("folder/blob", b"x", "text/plain")
    with pytest.raises(MissingBlobError):
        blobs.get(key, 10)


@pytest.mark.parametrize("size", [101, 100_000])
def test_a_blob_over_the_limit_is_refused_as_too_large(blobs: BlobStore, size: int) -> None:
    blobs.put("big", b"x" * size, "text/plain")
    with pytest.raises(InvalidImageError) as caught:
        blobs.get("big", 100)
    assert caught.value.code == "image_too_large"
    assert "100 bytes" in caught.value.message


def test_a_blob_of_exactly_the_limit_is_read(blobs: BlobStore) -> None:
    blobs.put("just", b"x" * 100, "text/plain")
    assert len(blobs.get("just", 100)) == 100


def test_a_listing_is_in_the_order_of_bytes_whatever_the_folders(blobs: BlobStore) -> None:
    keys = ["a", "a-b", "a.b", "ab/c", "ab/c0", "ab0", "B", "b/2/x", "b/10/x", "zoo/é", "zoo/z", "zoo/\U0001f600", "zoo/\uffee"]
    for key in reversed(keys):
        blobs.put(key, b"x", "text/plain")
    assert blobs.list("", 100) == sorted(keys, key=str.encode)


def test_a_listing_is_cut_at_its_limit_from_the_front(blobs: BlobStore) -> None:
    for number in range(5):
        blobs.put(f"k/{number}", b"x", "text/plain")
    assert blobs.list("k/", 3) == ["k/0", "k/1", "k/2"]
    assert blobs.list("k/", 0) == []


@pytest.mark.parametrize(
    ("prefix", "found"),
    [
        ("", ["ab/c/d", "ab/ce", "abc"]),
        ("ab", ["ab/c/d", "ab/ce", "abc"]),
        ("ab/", ["ab/c/d", "ab/ce"]),
        ("ab/c", ["ab/c/d", "ab/ce"]),
        ("ab/c/", ["ab/c/d"]),
        ("abc", ["abc"]),
        ("x", []),
        ("ab/c/d/e", []),
        ("../", []),
    ],
)
def test_a_listing_holds_the_keys_that_begin_with_the_prefix(blobs: BlobStore, prefix: str, found: list[str]) -> None:
    for key in ("ab/c/d", "ab/ce", "abc"):
        blobs.put(key, b"x", "text/plain")
    assert blobs.list(prefix, 10) == found


def test_deleting_removes_the_named_blobs_and_no_others(blobs: BlobStore) -> None:
    for key in ("t/1/a", "t/1/b", "t/2/a"):
        blobs.put(key, b"x", "text/plain")
    blobs.delete(["t/1/a", "t/2/a"])
    assert blobs.list("", 10) == ["t/1/b"]


def test_deleting_what_is_not_there_is_no_error(blobs: BlobStore) -> None:
    blobs.put("folder/blob", b"x", "text/plain")
    blobs.delete(["absent", "folder", "folder/blob/below", "folder/" + "x" * 300, *BAD_KEYS])
    blobs.delete(["absent"])
    blobs.delete([])
    assert blobs.list("", 10) == ["folder/blob"]


@pytest.mark.parametrize(
    "key", ["grüße/日本.png", "with space + plus & <amp>.png", "100%.png", "a%2Fb", "e\u0301", "q?x=1#y", "*'()!~@:,=;$"]
)
def test_any_printable_key_is_stored_listed_and_deleted(blobs: BlobStore, key: str) -> None:
    blobs.put(key, b"x", "text/plain")
    assert blobs.get(key, 1) == b"x"
    assert blobs.list(key, 10) == [key]
    blobs.delete([key])
    assert blobs.list("", 10) == []


@pytest.mark.parametrize("key", BAD_KEYS)
def test_a_key_that_could_mean_two_things_is_never_stored_nor_found(blobs: BlobStore, key: str) -> None:
    with pytest.raises(ValueError, match=r"^The key "):
        blobs.put(key, b"x", "text/plain")
    with pytest.raises(MissingBlobError):
        blobs.get(key, 10)
    assert blobs.list("", 10) == []


def test_a_probe_passes_and_leaves_nothing_behind(blobs: BlobStore) -> None:
    blobs.probe()
    assert blobs.list("", 10) == []


def test_eight_threads_can_put_at_the_same_time(blobs: BlobStore) -> None:
    keys = [f"masks/p/{number % 3}/{number}" for number in range(64)]
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda key: blobs.put(key, key.encode(), "text/plain"), keys))
        assert list(threads.map(lambda key: blobs.get(key, 100), keys)) == [key.encode() for key in keys]
    assert blobs.list("", 100) == sorted(keys)


def test_eight_threads_can_put_the_same_blob(tmp_path: Path) -> None:
    # In a folder only: a real bucket orders such writes itself, and the one of the tests fails at it now and then.
    blobs = FileBlobs(tmp_path / "blobs")
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda _: blobs.put("same/key", b"x" * 10_000, "text/plain"), range(32)))
    assert blobs.get("same/key", 10_000) == b"x" * 10_000
    assert blobs.list("", 10) == ["same/key"]


def test_puts_survive_deletes_of_their_neighbours(blobs: BlobStore) -> None:
    def put_and_delete(number: int) -> None:
        for turn in range(10):
            blobs.put(f"deep/down/below/{number}-{turn}", b"x", "text/plain")
            blobs.delete([f"deep/down/below/{number}-{turn}"])

    with ThreadPoolExecutor(8) as threads:
        list(threads.map(put_and_delete, range(8)))
    assert blobs.list("", 10) == []
