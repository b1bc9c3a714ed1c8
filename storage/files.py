"""BlobStore in a local folder, for the demo, for tests and for hosts without R2. A key is a relative path below the root."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

from storage.base import ConfigurationError, MissingBlobError, UnavailableError
from storage.blobs import key_fault, too_large

_INCOMING = ".incoming"
"""Folder below the root where files are written before they move to their place; never listed, never a key."""

_MOVES_MAX = 50
"""Times that a put makes its folder again after a concurrent delete removed it."""

_NO_SUCH_BLOB = frozenset({errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG})
_REFUSED = frozenset({errno.EACCES, errno.EPERM, errno.EROFS})
_CLASHES = frozenset({errno.EEXIST, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG})
"""What a path says that has a file where a folder should be, or the other way round, or too long a name."""


class FileBlobs:
    """Blobs as files below `root` (made at the first put). Thread-safe, also between processes that share the folder.

    A reader never sees half a file: writes go to a file beside, reach the disk, and are moved into place. A writer that
    is killed leaves its unfinished file in `.incoming`, where it does no harm.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._incoming = root / _INCOMING

    def get(self, key: str, bytes_max: int) -> bytes:
        """The file's bytes.

        Raises MissingBlobError, InvalidImageError("image_too_large"), ConfigurationError, UnavailableError.
        """
        if _fault(key):
            raise MissingBlobError(key)
        try:
            return _read(self._root / key, bytes_max)
        except OSError as error:
            if error.errno in _NO_SUCH_BLOB:
                raise MissingBlobError(key) from error
            raise _said(error, "read") from error

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store `data`; a folder keeps no content type. Raises ValueError for a key that no path can be, ConfigurationError,
        UnavailableError (disk full among others)."""
        if fault := _fault(key):
            raise ValueError(fault)
        try:
            with self._staged(data) as staged:
                _move(staged, self._root / key)
        except OSError as error:
            raise _said(error, "write") from error

    def delete(self, keys: Sequence[str]) -> None:
        """Remove files and the folders that become empty. Raises ConfigurationError, UnavailableError."""
        for key in keys:
            if _fault(key):
                continue
            try:
                self._remove(self._root / key)
            except OSError as error:
                raise _said(error, "delete") from error

    def list(self, prefix: str, limit: int) -> list[str]:
        """At most `limit` keys that begin with `prefix`, in the order of their UTF-8 bytes, as S3 lists them."""
        try:
            return list(islice(_keys(self._root, "", prefix), max(limit, 0)))
        except OSError as error:
            raise _said(error, "list") from error

    def probe(self) -> None:
        """Write and remove an empty file. Raises ConfigurationError (folder not writable), UnavailableError (disk full)."""
        try:
            with self._staged(b""):
                pass
        except OSError as error:
            raise _said(error, "write") from error

    def describe(self) -> str:
        """The folder."""
        return f"folder {self._root.absolute()}"

    @contextmanager
    def _staged(self, data: bytes) -> Iterator[Path]:
        """A file with `data`, on disk, in the incoming folder; gone afterwards unless it was moved."""
        self._incoming.mkdir(parents=True, exist_ok=True)
        staged = self._incoming / uuid.uuid4().hex
        try:
            with staged.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            yield staged
        finally:
            staged.unlink(missing_ok=True)

    def _remove(self, path: Path) -> None:
        try:
            path.unlink()
        except OSError as error:
            if error.errno not in _NO_SUCH_BLOB and not path.is_dir():
                raise
            return
        _prune(path.parent, self._root)


def _fault(key: str) -> str | None:
    if key.split("/", 1)[0] == _INCOMING:
        return f"The key begins with {_INCOMING}, which the store keeps for itself."
    return key_fault(key)


def _read(path: Path, bytes_max: int) -> bytes:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > bytes_max:
            raise too_large(size, bytes_max)
        return file.read(bytes_max)


def _move(staged: Path, target: Path) -> None:
    """Move a file into its folder, making that again as often as a concurrent delete takes it away."""
    for attempt in range(1, _MOVES_MAX + 1):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(staged, target)
            return
        except (FileNotFoundError, FileExistsError) as error:
            if attempt == _MOVES_MAX:
                raise _no_place(error) from error
        except OSError as error:
            raise _no_place(error) from error


def _no_place(error: OSError) -> Exception:
    """A key whose folder is a file, whose file is a folder or whose name is too long is the caller's mistake."""
    if error.errno in _CLASHES:
        return ValueError(f"The key cannot be a file here: {os.strerror(error.errno)}.")
    return _said(error, "write")


def _prune(folder: Path, root: Path) -> None:
    """Remove `folder` and its parents below `root` as far as they are empty."""
    while folder != root:
        try:
            folder.rmdir()
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT):
                return
            raise
        folder = folder.parent


def _keys(folder: Path, above: str, prefix: str) -> Iterator[str]:
    """Keys below `folder`, whose own key is `above`, in order: a folder sorts as its name with a slash behind."""
    for name in sorted(_names(folder)):
        key = above + name
        if name.endswith("/") and (key.startswith(prefix) or prefix.startswith(key)) and key != f"{_INCOMING}/":
            yield from _keys(folder / name, key, prefix)
        elif not name.endswith("/") and key.startswith(prefix):
            yield key


def _names(folder: Path) -> list[str]:
    try:
        with os.scandir(folder) as entries:
            return [entry.name + "/" if entry.is_dir() else entry.name for entry in entries]
    except FileNotFoundError:  # a concurrent delete emptied the folder, or nothing was ever stored
        return []


def _said(error: OSError, verb: str) -> UnavailableError | ConfigurationError:
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    sentence = f"The blob folder cannot {verb}: {reason}."
    if error.errno in _REFUSED or error.errno in _CLASHES:
        return ConfigurationError(f"{sentence} Check MASKD_BLOB_DIR and who may write there.")
    return UnavailableError(sentence)
