"""`maskd weights` as a person calls it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from support.checkpoints import exported, needs_torch, network, save
from support.hub import hub

from daemon.config import weights_settings
from models.weights import CHECKPOINT_FILE, DECODER_FILE, ENCODER_FILE, record

ROOT = Path(__file__).parents[2]


def weights(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    settings = {"PYTHONPATH": str(ROOT), "MASKD_WEIGHTS_DIR": str(folder / "weights"), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "daemon", "weights", *arguments],
        cwd=folder,
        env={**os.environ, **settings, **more},
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_list_says_of_each_file_whether_it_is_there(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / ENCODER_FILE).write_bytes(b"mine")
    rows = [line.split("\t") for line in weights(tmp_path, "list").stdout.splitlines()]
    assert [row[1:3] for row in rows if row[0].startswith("mobile-sam")] == [
        [ENCODER_FILE, "in place, without a checksum"],
        [DECODER_FILE, "missing"],
        [CHECKPOINT_FILE, "missing"],
    ]
    assert {row[1]: row[2:] for row in rows}["sam3/vocab.json"] == ["missing, optional", "facebook/sam3", "SAM, gated"]


@pytest.mark.parametrize("columns", [80, 120])
def test_on_a_terminal_the_list_is_a_table_that_fits(tmp_path: Path, columns: int) -> None:
    for name in ("sam2", "sam3"):
        (tmp_path / "weights" / name).mkdir(parents=True)
        (tmp_path / "weights" / name / "config.json").write_bytes(b"{}")
    record(tmp_path / "weights" / "sam2" / "config.json", "a" * 64)
    lines = on_a_terminal(tmp_path, columns, "list")
    assert lines[0].split() == ["network", "engine", "serves", "size", "licence", "state"]
    assert max(map(len, lines[:-1])) <= columns
    by_name = {line.split()[0]: line.split() for line in reversed(lines)}  # the table comes before what is said of it
    assert by_name["sam3"][1] == "sam3"
    assert " ".join(by_name["sam3"][-5:]) == "3.4 GB SAM, gated incomplete"
    assert " ".join(by_name["sam2-small"][-4:]) == "184 MB Apache-2.0 missing"
    assert "sam3 is incomplete: tokenizer.json, model.safetensors" in lines
    assert "sam2 is damaged: config.json" in lines


def on_a_terminal(folder: Path, columns: int, *arguments: str) -> list[str]:
    """What a person sees, without colours."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))
    settings = {"PYTHONPATH": str(ROOT), "MASKD_WEIGHTS_DIR": str(folder / "weights"), "TERM": "xterm", "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "daemon", "weights", *arguments]
    with subprocess.Popen(command, cwd=folder, env={**os.environ, **settings}, stdout=theirs, stderr=theirs):
        os.close(theirs)
        shown = b""
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines()]
    return [line for line in lines[lines.index(next(line for line in lines if line.startswith("network"))) :] if line]


def test_a_gated_network_is_pulled_with_the_token_into_its_folder(tmp_path: Path) -> None:
    files = {"config.json": b"{}", "tokenizer.json": b"{}", "model.safetensors": b"x" * 1000}
    with hub() as there:
        there.files, there.gate = files, "hf_friend"
        refused = weights(tmp_path, "pull", "sam3", HF_ENDPOINT=there.address, HF_HUB_OFFLINE="0")
        done = weights(tmp_path, "pull", "sam3", HF_ENDPOINT=there.address, HF_HUB_OFFLINE="0", HF_TOKEN="hf_friend")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr.startswith("maskd: the hub does not give facebook/sam3 to everyone: request access at ")
    assert done.returncode == 0, done.stderr
    assert [Path(line.split()[0]).relative_to(tmp_path / "weights" / "sam3").name for line in done.stdout.splitlines()] == [
        *files
    ]
    assert "fetching model.safetensors, 0.0 MB" in done.stderr


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
