"""What a folder does that a bucket cannot show: whole files, folders that vanish, full and forbidden disks."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from storage.base import ConfigurationError, MissingBlobError, UnavailableError
from storage.files import FileBlobs


def failing(number: int) -> object:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def test_deleting_removes_emptied_folders_but_never_the_root(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    blobs.put("a/b/c", b"x", "")
    blobs.put("a/d", b"x", "")
    blobs.delete(["a/b/c"])
    assert not (tmp_path / "a/b").exists()
    blobs.delete(["a/d"])
    assert not (tmp_path / "a").exists()
    assert tmp_path.exists()


def test_a_write_that_fails_leaves_neither_blob_nor_remains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = FileBlobs(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(UnavailableError):
        blobs.put("a/b", b"x", "")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_an_overwrite_that_fails_leaves_the_old_blob_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = FileBlobs(tmp_path)
    blobs.put("a", b"old", "")
    monkeypatch.setattr(os, "replace", failing(errno.ENOSPC))
    with pytest.raises(UnavailableError):
        blobs.put("a", b"new", "")
    assert blobs.get("a", 10) == b"old"


def test_the_file_is_on_disk_before_it_takes_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    sync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda number: (calls.append("fsync"), sync(number)))
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append("replace"), replace(a, b)))
    FileBlobs(tmp_path).put("a", b"x", "")
    assert calls == ["fsync", "replace"]


def test_a_full_disk_is_unavailable(tmp_path: Path) -> None:
    """A file size limit of the process stands for the disk; the kernel answers EFBIG where a full disk answers ENOSPC."""
    script = f"""if True:
        import resource, signal
        from pathlib import Path
        from storage.base import UnavailableError
        from storage.files import FileBlobs
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        blobs = FileBlobs(Path({str(tmp_path)!r}))
        blobs.put("small", b"x", "")
        try:
            blobs.put("large", b"x" * 10000, "")
        except UnavailableError as error:
            print(error, blobs.list("", 10), flush=True)
    """
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout == "The blob folder cannot write: File too large. ['small']\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_is_unavailable_to_put_and_probe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    blobs = FileBlobs(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(number))
    for call in (blobs.probe, lambda: blobs.put("a", b"x", "")):
        with pytest.raises(UnavailableError, match=os.strerror(number)):
            call()


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_a_folder_that_may_not_be_written_is_a_matter_of_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    blobs = FileBlobs(tmp_path)
    monkeypatch.setattr(os, "fsync", failing(number))
    with pytest.raises(ConfigurationError, match="MASKD_BLOB_DIR"):
        blobs.probe()


def test_a_root_that_is_a_file_is_a_matter_of_configuration(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x")
    blobs = FileBlobs(tmp_path / "file")
    for call in (blobs.probe, lambda: blobs.put("a", b"x", "")):
        with pytest.raises(ConfigurationError):
            call()


def test_an_unreadable_disk_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = FileBlobs(tmp_path)
    blobs.put("a", b"x", "")
    monkeypatch.setattr(Path, "open", failing(errno.EIO))
    with pytest.raises(UnavailableError):
        blobs.get("a", 10)


def test_a_key_below_another_blob_is_refused_as_the_callers_mistake(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    blobs.put("a", b"x", "")
    blobs.put("b/c", b"x", "")
    for key in ("a/below", "b", "x" * 300):
        with pytest.raises(ValueError, match="cannot be a file here"):
            blobs.put(key, b"x", "")


def test_the_folder_of_unfinished_writes_holds_no_blobs(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    blobs.probe()
    (tmp_path / ".incoming" / "left-over").write_bytes(b"half")
    assert blobs.list("", 10) == []
    assert blobs.list(".incoming/", 10) == []
    with pytest.raises(MissingBlobError):
        blobs.get(".incoming/left-over", 10)
    with pytest.raises(ValueError, match="keeps for itself"):
        blobs.put(".incoming/x", b"x", "")


def test_a_reader_never_sees_half_a_blob(tmp_path: Path) -> None:
    blobs = FileBlobs(tmp_path)
    versions = [bytes([number]) * 200_000 for number in range(2)]
    blobs.put("a", versions[0], "")
    done = threading.Event()

    def write() -> None:
        for number in range(30):
            blobs.put("a", versions[number % 2], "")
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    while not done.is_set():
        assert blobs.get("a", 200_000) in versions
    writer.join()
