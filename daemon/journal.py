"""A small file that says which tasks are in a handler now, so that a process that was killed can be blamed by its successor.

One append-only file per process, locked while the process lives; no fsync: it must survive a kill, not a power cut.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl, urlsplit

import structlog

from storage.base import ConfigurationError

log = structlog.get_logger(__name__)

COMPACT_BYTES = 256 * 1024
FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO})
"""What a disk says that is full or broken: no mistake in the settings."""


@dataclass(frozen=True, slots=True)
class Death:
    """A worker that ended without leaving, and the tasks that were in its handlers."""

    worker: str
    begun_ids: tuple[str, ...]
    file: Path


class Journal:
    """Which batches run in this process. `folder` None keeps none; ConfigurationError when it may not be written. A disk that is
    full costs the knowledge of what ran, never a task."""

    def __init__(self, folder: Path | None, worker: str, database: str) -> None:
        self._open: dict[int, Sequence[str]] = {}
        self._file: int | None = None
        self._path: Path | None = None
        self._size = 0
        self._torn = False
        if folder is not None:
            self._path = _path(folder, database, worker)
            try:
                self._file = _locked(self._path)
            except OSError as error:
                if error.errno in FULL:
                    log.error("journal.not_written", reason=error.strerror)
                    return
                raise ConfigurationError(f"MASKD_STATE_DIR {folder} cannot be written: {error.strerror}") from error

    def begin(self, batch: int, ids: Sequence[str]) -> None:
        """A batch goes to a thread."""
        self._open[batch] = ids
        self._write(f"B {batch} {' '.join(ids)}\n")

    def end(self, batch: int) -> None:
        """The thread came back."""
        del self._open[batch]
        self._write(f"E {batch}\n")

    def close(self) -> None:
        """The process ends in good order: nothing to blame."""
        if self._file is not None and self._path is not None:
            self._path.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _write(self, text: str) -> None:
        """Append a line; what grew too long, or was cut off by a full disk, is written anew."""
        if self._file is None:
            return
        try:
            if self._torn or self._size > COMPACT_BYTES:
                os.ftruncate(self._file, 0)
                self._size = 0
                text = "".join(f"B {number} {' '.join(ids)}\n" for number, ids in self._open.items())
            data = text.encode()
            written = os.write(self._file, data) if data else 0
            if written < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            if not self._torn:
                log.error("journal.not_written", reason=error.strerror)
            self._torn = True
            return
        self._size += written
        self._torn = False


def _path(folder: Path, database: str, worker: str) -> Path:
    return folder / f"{mark(database)}-{worker}.journal"


def _locked(path: Path) -> int:
    """A new file, open and locked; nobody finds it before it is."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    young = path.with_suffix(".young")
    file = os.open(young, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    young.rename(path)
    return file


def mark(database: str) -> str:
    """A short name of the database behind a DSN, the same after its password has changed. Projects behind one pooler differ by
    the end of their user's name only, servers of one host by their sockets' folders."""
    parts = urlsplit(database)
    tenant = (parts.username or "").partition(".")[2]
    socket = "".join(value for name, value in parse_qsl(parts.query) if name in ("host", "port"))
    return hashlib.sha256(f"{parts.hostname}:{parts.port}{parts.path}{tenant}{socket}".encode()).hexdigest()[:12]


def deaths(folder: Path, database: str) -> list[Death]:
    """Journals of this database whose process is gone. The caller reports each, then `forget`s it."""
    found = []
    for path in sorted(folder.glob(f"{mark(database)}-*.journal")):
        text = _of_the_dead(path)
        if text is not None:
            found.append(Death(path.stem.partition("-")[2], _begun(text), path))
    return found


def lives(folder: Path, database: str, worker: str) -> bool:
    """Whether the process of that worker still runs on this host."""
    path = _path(folder, database, worker)
    return path.exists() and _of_the_dead(path) is None


def _of_the_dead(path: Path) -> str | None:
    """What a journal says whose process is gone; None while it lives. Empty when another successor has dealt with it."""
    try:
        file = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return ""
    except PermissionError:  # another user's: nobody can say here whether it lives, so its own kind succeeds it
        log.warning("journal.unreadable", file=path.name)
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        with open(file, closefd=False) as text:
            return text.read()
    except BlockingIOError:
        return None
    finally:
        os.close(file)


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
