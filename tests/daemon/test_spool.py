"""The spool: what waits for the database on disk, whatever happens to the process or the disk."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import anyio
import pytest
from structlog.testing import capture_logs

from daemon.journal import Journal, deaths, mark
from daemon.spool import LOT_OUTCOMES_MAX, Spool, left_behind, remove
from storage.base import Fate, Outcome

pytestmark = pytest.mark.anyio
WORKER = str(uuid.uuid4())


def an_end(fate: Fate = Fate.DONE, values: str = '{"labels": ["é\\u2028"]}') -> Outcome:
    return Outcome(str(uuid.uuid4()), str(uuid.uuid4()), fate, values, "code", "message", 1.5, True)


def a_spool(folder: Path, most: int = 1000, bytes_max: int = 1_000_000) -> Spool:
    return Spool(folder, WORKER, "db", most, bytes_max)


def facts(outcome: Outcome) -> tuple[object, ...]:
    return tuple(getattr(outcome, name) for name in Outcome.__slots__)


async def test_a_successor_reads_every_outcome_as_it_was(tmp_path: Path) -> None:
    ends = [an_end(fate) for fate in Fate]
    await a_spool(tmp_path).keep(ends)
    (lot,) = left_behind(tmp_path, "db")
    assert (lot.worker, [facts(outcome) for outcome in lot.outcomes]) == (WORKER, [facts(outcome) for outcome in ends])
    assert left_behind(tmp_path, "another database") == []
    remove(lot)
    assert list(tmp_path.iterdir()) == []


def waits_for_the_database(folder: str, channel: Connection) -> None:
    journal = Journal(Path(folder), WORKER, "db")
    journal.begin(1, ["a"])
    anyio.run(a_spool(Path(folder)).keep, [an_end(), an_end()])
    channel.send("kept")
    signal.pause()


def test_what_a_living_process_keeps_is_not_its_neighbours(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=waits_for_the_database, args=(str(tmp_path), there))
    process.start()
    assert here.poll(30)
    assert left_behind(tmp_path, "db") == []
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    assert [len(lot.outcomes) for lot in left_behind(tmp_path, "db")] == [2]


async def test_what_is_settled_leaves_the_disk_and_the_rest_stays(tmp_path: Path) -> None:
    spool = a_spool(tmp_path)
    ends = [an_end() for _ in range(LOT_OUTCOMES_MAX + 10)]
    await spool.keep(ends)
    claims = [(end.id, end.token) for end in ends]
    assert len(list(tmp_path.iterdir())) == 2
    spool.forget(claims[: LOT_OUTCOMES_MAX + 1])
    assert [len(lot.outcomes) for lot in left_behind(tmp_path, "db")] == [10]
    assert claims[-1] in spool
    spool.forget(claims)
    assert (len(spool), list(tmp_path.iterdir())) == (0, [])


@pytest.mark.parametrize("cut", [0, 5, 40, -1])
async def test_a_file_that_is_not_what_was_written_is_left_out_and_removed(tmp_path: Path, cut: int) -> None:
    spool = a_spool(tmp_path)
    await spool.keep([an_end()])
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:cut])
    with capture_logs() as lines:
        (lot,) = left_behind(tmp_path, "db")
    assert lot.outcomes == ()
    assert [line["event"] for line in lines] == ["spool.damaged"]
    remove(lot)
    assert left_behind(tmp_path, "db") == []


async def test_a_file_whose_writer_was_killed_half_way_counts_for_nothing(tmp_path: Path) -> None:
    await a_spool(tmp_path).keep([an_end()])
    (file,) = tmp_path.iterdir()
    file.rename(file.with_name(file.name + ".young"))
    assert left_behind(tmp_path, "db") == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("most", "bytes_max"), [(60, 1_000_000), (1000, 20_000)], ids=["in number", "in bytes"])
async def test_it_is_bounded_and_says_so_once(tmp_path: Path, most: int, bytes_max: int) -> None:
    spool = a_spool(tmp_path, most, bytes_max)
    ends = [an_end(values='{"labels": "' + "x" * 100 + '"}') for _ in range(120)]
    with capture_logs() as lines:
        await spool.keep(ends)
        await spool.keep([end for end in ends if (end.id, end.token) not in spool])
    assert 0 < len(spool) <= most
    assert sum(file.stat().st_size for file in tmp_path.iterdir()) <= bytes_max
    assert [line["event"] for line in lines] == ["spool.in_memory_only"]


@contextmanager
def full_disk(bytes_free: int) -> Iterator[None]:
    """No file of this process may grow beyond so many bytes: the nearest to a full disk that needs no privileges."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


async def test_a_full_disk_loses_nothing_and_is_said_once(tmp_path: Path) -> None:
    spool = a_spool(tmp_path)
    end = an_end()
    with capture_logs() as lines, full_disk(50):
        await spool.keep([end])
        await spool.keep([end])
    assert (len(spool), list(tmp_path.iterdir())) == (0, [])
    assert [line["event"] for line in lines] == ["spool.in_memory_only"]
    await spool.keep([end])
    assert [len(lot.outcomes) for lot in left_behind(tmp_path, "db")] == [1]


async def test_a_full_disk_does_not_stop_batches_and_the_journal_is_true_again_after_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, WORKER, "db")
    journal.begin(1, ["a"])
    with capture_logs() as lines, full_disk(10):
        journal.begin(2, ["b"])
        journal.end(1)
        journal.begin(3, ["c"])
    assert {line["event"] for line in lines} == {"journal.not_written"}
    journal.end(2)
    (file,) = tmp_path.iterdir()
    assert file.read_text() == "B 3 c\n"


async def test_a_disk_that_does_not_let_go_of_a_file_stops_nothing(tmp_path: Path) -> None:
    spool = a_spool(tmp_path)
    end = an_end()
    await spool.keep([end])
    (file,) = tmp_path.iterdir()
    file.unlink()
    file.mkdir()  # the nearest to a disk that became read-only which needs no privileges
    with capture_logs() as lines:
        spool.forget([(end.id, end.token)])
        assert left_behind(tmp_path, "db") == []
    assert len(spool) == 0
    assert [line["event"] for line in lines] == ["spool.not_removed", "spool.unreadable"]


def test_files_of_another_user_are_left_to_that_user() -> None:
    with tempfile.TemporaryDirectory() as name:  # its parents may be entered by anybody
        folder, root = Path(name), os.geteuid() == 0
        journal = Journal(folder, WORKER, "db")
        journal.close()
        for suffix in (".journal", ".1.ends"):
            file = folder / f"{mark('db')}-{WORKER}{suffix}"
            file.write_text("B 1 a\n")
            file.chmod(0)
        folder.chmod(0o777)
        try:
            if root:
                os.seteuid(65534)
            assert (deaths(folder, "db"), left_behind(folder, "db")) == ([], [])
            (folder / f"{mark('db')}-{WORKER}.journal").unlink()
            assert left_behind(folder, "db") == [], "what cannot be read is not thrown away"
        finally:
            if root:
                os.seteuid(0)
        assert [file.name.rpartition(".")[2] for file in folder.iterdir()] == ["ends"]
