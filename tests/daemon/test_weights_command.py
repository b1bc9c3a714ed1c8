"""`maskd weights` as a person calls it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import exported, needs_torch, network, save

from daemon.config import weights_settings
from models.weights import CHECKPOINT_FILE, DECODER_FILE, ENCODER_FILE

ROOT = Path(__file__).parents[2]


def weights(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONPATH": str(ROOT), "MASKD_WEIGHTS_DIR": str(folder / "weights"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "daemon", "weights", *arguments],
        cwd=folder,
        env={**os.environ, **settings},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_list_says_of_each_file_whether_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / ENCODER_FILE).write_bytes(b"mine")
    rows = [line.split("\t") for line in weights(tmp_path, "list").stdout.splitlines()]
    assert [row[1:3] for row in rows] == [
        [ENCODER_FILE, "in place, without a checksum"],
        [DECODER_FILE, "missing"],
        [CHECKPOINT_FILE, "missing"],
    ]


def test_a_pull_without_a_hub_fails_in_one_sentence(tmp_path: Path) -> None:
    done = weights(tmp_path, "pull")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "maskd: the hub cannot be reached (OfflineModeIsEnabled)\n"
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_network_is_answered_with_those_there_are(tmp_path: Path) -> None:
    assert "there is no network sam9; there are: mobile-sam" in weights(tmp_path, "pull", "sam9").stderr


def test_an_export_without_a_checkpoint_says_how_to_get_it(tmp_path: Path) -> None:
    needs_torch()
    assert "run: maskd weights pull mobile-sam-checkpoint" in weights(tmp_path, "export").stderr


def test_a_checkpoint_of_full_size_becomes_two_files_that_work(tmp_path: Path) -> None:
    """Loads all keys strictly, exports, and runs encoder and decoder at 1024 model pixels."""
    needs_torch()
    from models.export_mobile_sam import Sizes

    checkpoint = save(network(Sizes()), tmp_path / "mine.pt")
    done = weights(tmp_path, "export", "--from", str(checkpoint))
    assert done.returncode == 0, done.stderr
    assert [Path(line.split()[0]).name for line in done.stdout.splitlines()] == [ENCODER_FILE, DECODER_FILE]
    assert weights(tmp_path, "list").stdout.count("\tin place\t") == 2


def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path) -> None:
    folder = exported()
    (tmp_path / "weights").mkdir()
    shutil.copy(folder / CHECKPOINT_FILE, tmp_path / "weights")
    done = weights(tmp_path, "export")
    assert done.returncode == 1
    assert "is not MobileSAM: it lacks" in done.stderr


@pytest.mark.parametrize(("environ", "expected"), [({}, "weights"), ({"MASKD_WEIGHTS_DIR": "/x"}, "/x")])
def test_the_folder_needs_no_other_setting(environ: dict[str, str], expected: str) -> None:
    assert weights_settings(environ, Path("/nonexistent"))[0] == Path(expected)


def test_the_token_does_not_print() -> None:
    assert "hf_word" not in repr(weights_settings({"HF_TOKEN": "hf_word"}, Path("/nonexistent")))
