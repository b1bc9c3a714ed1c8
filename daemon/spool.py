"""The spool: outcomes that the database has not taken yet, on disk, so that a process that is killed loses no finished work.

One small file per lot: written beside, synced, moved into place, deleted once all of it is settled. A file whose process is
gone is its successor's to publish. What does not fit, or cannot be written, waits in memory alone.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import anyio
import anyio.to_thread
import structlog

from daemon import journal, metrics
from storage.base import Fate, Outcome

log = structlog.get_logger(__name__)

WRITE_SECONDS_MAX = 10.0
LOT_OUTCOMES_MAX = 50
Claim = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Lot:
    """Outcomes that a process which is gone had left to publish."""

    worker: str
    outcomes: tuple[Outcome, ...]
    file: Path


class Spool:
    """The outcomes of this process that wait on disk: at most `most`, of `bytes_max` in all. `folder` None keeps none."""

    def __init__(self, folder: Path | None, worker: str, database: str, most: int, bytes_max: int) -> None:
        self._folder = folder
        self._name = f"{journal.mark(database)}-{worker}"
        self._most = most
        self._bytes_max = bytes_max
        self._lots: dict[Path, tuple[set[Claim], int]] = {}
        self._number = 0
        self._complained = False
        self._one = anyio.CapacityLimiter(1)

    def __len__(self) -> int:
        return sum(len(claims) for claims, _ in self._lots.values())

    def __contains__(self, claim: object) -> bool:
        return any(claim in claims for claims, _ in self._lots.values())

    def __iter__(self) -> Iterator[Claim]:
        return iter([claim for claims, _ in self._lots.values() for claim in claims])

    async def keep(self, outcomes: Sequence[Outcome]) -> None:
        """Write these to disk, as far as there is room. Never fails: they wait in memory too."""
        for first in range(0, len(outcomes), LOT_OUTCOMES_MAX):
            if self._folder is None or not await self._keep(self._folder, outcomes[first : first + LOT_OUTCOMES_MAX]):
                return

    async def _keep(self, folder: Path, outcomes: Sequence[Outcome]) -> bool:
        """Write one lot; whether that went well."""
        data = _encode(outcomes)
        if len(self) + len(outcomes) > self._most or len(data) + sum(size for _, size in self._lots.values()) > self._bytes_max:
            self._complain("MASKD_SPOOL_MAX or MASKD_SPOOL_MB is reached")
            return False
        self._number += 1
        path = folder / f"{self._name}.{self._number}.ends"
        try:
            with anyio.fail_after(WRITE_SECONDS_MAX):
                await anyio.to_thread.run_sync(_write, path, data, limiter=self._one, abandon_on_cancel=True)
        except (OSError, TimeoutError) as error:
            self._complain(os.strerror(error.errno) if error.errno else "the disk does not answer")
            return False
        self._complained = False
        self._lots[path] = ({(outcome.id, outcome.token) for outcome in outcomes}, len(data))
        metrics.SPOOLED.set(len(self))
        return True

    def forget(self, claims: Sequence[Claim]) -> None:
        """These are settled."""
        for path, (left, _) in list(self._lots.items()):
            left.difference_update(claims)
            if not left:
                del self._lots[path]
                _unlink(path)
        metrics.SPOOLED.set(len(self))

    def _complain(self, reason: str) -> None:
        """Once, until one is written again."""
        if not self._complained:
            self._complained = True
            log.error("spool.in_memory_only", reason=reason)


def left_behind(folder: Path, database: str) -> list[Lot]:
    """What processes of this host that are gone had left to publish in this database; the caller settles and `remove`s each."""
    mark, lots = journal.mark(database), []
    for path in sorted(folder.glob(f"{mark}-*.ends")):
        worker = path.name.removeprefix(f"{mark}-").partition(".")[0]
        if journal.lives(folder, database, worker):
            continue
        try:
            outcomes = _decode(path)
        except OSError as error:  # another user's, perhaps: whoever can read it publishes it
            log.error("spool.unreadable", worker=worker, file=path.name, reason=error.strerror)
            continue
        if outcomes is None:
            log.error("spool.damaged", worker=worker, file=path.name)
        lots.append(Lot(worker, outcomes or (), path))
    for path in folder.glob(f"{mark}-*.ends.young"):  # its writer was killed: what it held was not yet kept
        if not journal.lives(folder, database, path.name.removeprefix(f"{mark}-").partition(".")[0]):
            _unlink(path)
    return lots


def remove(lot: Lot) -> None:
    """All of it is published, or lost to others."""
    _unlink(lot.file)


def _encode(outcomes: Sequence[Outcome]) -> bytes:
    body = b"".join(json.dumps(asdict(outcome)).encode() + b"\n" for outcome in outcomes)
    return b"%08x\n" % zlib.crc32(body) + body


def _decode(path: Path) -> tuple[Outcome, ...] | None:
    """The outcomes of a file, None when it is not what was written; an empty one when another successor has removed it."""
    try:
        head, _, body = path.read_bytes().partition(b"\n")
        if int(head, 16) != zlib.crc32(body):
            return None
        rows = [json.loads(line) for line in body.splitlines()]
        return tuple(Outcome(**{**row, "fate": Fate(row["fate"])}) for row in rows)
    except FileNotFoundError:
        return ()
    except (ValueError, TypeError, KeyError):
        return None


def _unlink(path: Path) -> None:
    """What stays behind because the disk does not let go of it is settled again by a successor, which changes nothing."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.error("spool.not_removed", file=path.name, reason=error.strerror)


def _write(path: Path, data: bytes) -> None:
    """The whole file is there, power cuts included, or it is not."""
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    young = path.with_name(path.name + ".young")
    try:
        with open(os.open(young, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        young.rename(path)
    except OSError:
        young.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
