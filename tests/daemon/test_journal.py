"""The journal: what ran when a process was killed, and nothing else."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from daemon.journal import COMPACT_BYTES, Journal, deaths, forget, mark
from storage.base import ConfigurationError

WORKER = "11111111-1111-1111-1111-111111111111"


def killed_while_running(folder: str, channel: Connection) -> None:
    journal = Journal(Path(folder), WORKER, "db")
    journal.begin(1, ["a", "b"])
    journal.begin(2, ["c"])
    journal.end(1)
    channel.send("running")
    signal.pause()


def test_a_killed_process_leaves_the_batches_that_had_begun(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=killed_while_running, args=(str(tmp_path), there))
    process.start()
    assert here.poll(30)
    assert deaths(tmp_path, "db") == [], "it lives"
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(10)
    (death,) = deaths(tmp_path, "db")
    assert (death.worker, death.begun_ids) == (WORKER, ("c",))
    assert deaths(tmp_path, "another database") == []
    forget(death)
    assert deaths(tmp_path, "db") == []


def test_a_process_that_ends_in_good_order_leaves_nothing(tmp_path: Path) -> None:
    journal = Journal(tmp_path, WORKER, "db")
    journal.begin(1, ["a"])
    journal.close()
    assert list(tmp_path.iterdir()) == []


def test_the_file_stays_small_and_true_however_long_it_runs(tmp_path: Path) -> None:
    journal = Journal(tmp_path, WORKER, "db")
    journal.begin(0, ["lasting"])
    for number in range(1, 4000):
        journal.begin(number, ["x" * 36] * 5)
        journal.end(number)
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size < COMPACT_BYTES + 1000
    os.close(journal._file or -1)
    assert deaths(tmp_path, "db")[0].begun_ids == ("lasting",)


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    journal = Journal(tmp_path, WORKER, "db")
    journal.begin(1, ["a"])
    (file,) = tmp_path.iterdir()
    with file.open("a") as more:
        more.write("B 2 half-a-na")
    os.close(journal._file or -1)
    assert deaths(tmp_path, "db")[0].begun_ids == ("a",)


@pytest.mark.parametrize("name", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_a_mistake_of_configuration(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ConfigurationError, match=r"MASKD_STATE_DIR .*/file.* cannot be written"):
        Journal(tmp_path / name, WORKER, "db")


def test_databases_that_share_a_host_have_names_of_their_own() -> None:
    pooler = "@eu.pooler.example.com:6543/postgres"
    assert mark(f"postgresql://postgres.one:a{pooler}") == mark(f"postgresql://maskd.one:b{pooler}")
    assert mark(f"postgresql://postgres.one:a{pooler}") != mark(f"postgresql://postgres.two:a{pooler}")
    assert mark("postgresql:///maskd?host=/run/a") != mark("postgresql:///maskd?host=/run/b")
    assert mark("postgresql://a@host/db?sslmode=require") == mark("postgresql://b@host/db")
