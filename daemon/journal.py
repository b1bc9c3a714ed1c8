"""A small file that says which tasks are in a handler now, so that a process that was killed can be blamed by its successor.

One append-only file per process, locked while the process lives; no fsync: it must survive a kill, not a power cut.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from storage.base import ConfigurationError

COMPACT_BYTES = 256 * 1024


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that ended without leaving, and the tasks that were in its handlers."""

    worker: str
    begun_ids: tuple[str, ...]
    file: Path


class Journal:
    """Which batches run in this process. `folder` None keeps none; ConfigurationError when it cannot be written."""

    def __init__(self, folder: Path | None, worker: str, database: str) -> None:
        self._open: dict[int, Sequence[str]] = {}
        self._file: int | None = None
        self._path: Path | None = None
        self._size = 0
        if folder is not None:
            self._path = folder / f"{mark(database)}-{worker}.journal"
            try:
                self._file = _locked(self._path)
            except OSError as error:
                raise ConfigurationError(f"MASKD_STATE_DIR {folder} cannot be written: {error.strerror}") from error

    def begin(self, batch: int, ids: Sequence[str]) -> None:
        """A batch goes to a thread."""
        self._open[batch] = ids
        self._write(f"B {batch} {' '.join(ids)}\n")

    def end(self, batch: int) -> None:
        """The thread came back."""
        del self._open[batch]
        if self._size > COMPACT_BYTES and self._file is not None:
            text = "".join(f"B {number} {' '.join(ids)}\n" for number, ids in self._open.items())
            os.ftruncate(self._file, 0)
            self._size = 0
            self._write(text)
        else:
            self._write(f"E {batch}\n")

    def close(self) -> None:
        """The process ends in good order: nothing to blame."""
        if self._file is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _write(self, text: str) -> None:
        if self._file is not None and text:
            self._size += os.write(self._file, text.encode())


def _locked(path: Path) -> int:
    """A new file, open and locked; nobody finds it before it is."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    young = path.with_suffix(".young")
    file = os.open(young, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    young.rename(path)
    return file


def mark(database: str) -> str:
    """A short name of the database behind a DSN, the same after its password has changed."""
    parts = urlsplit(database)
    return hashlib.sha256(f"{parts.hostname}:{parts.port}{parts.path}".encode()).hexdigest()[:12]


def deaths(folder: Path, database: str) -> list[Death]:
    """Journals of this database whose process is gone. The caller reports each, then `forget`s it."""
    found = []
    for path in sorted(folder.glob(f"{mark(database)}-*.journal")):
        file = os.open(path, os.O_RDONLY)
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            found.append(Death(path.stem.partition("-")[2], _begun(path.read_text()), path))
        except BlockingIOError:
            continue  # its process lives
        finally:
            os.close(file)
    return found


def forget(death: Death) -> None:
    """The database knows of this death."""
    death.file.unlink(missing_ok=True)


def _begun(text: str) -> tuple[str, ...]:
    """Tasks of batches that began and did not end; a last line that was cut off is left out."""
    running: dict[str, list[str]] = {}
    for line in text.splitlines(keepends=True):
        words = line.split()
        if not line.endswith("\n") or len(words) < 2:
            continue
        if words[0] == "B":
            running[words[1]] = words[2:]
        else:
            running.pop(words[1], None)
    return tuple(task_id for ids in running.values() for task_id in ids)
