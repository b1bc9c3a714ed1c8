"""The check-up of this host: what is broken of blobs, sessions, weights, packages and disk, one at a time."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.s3 import S3Server, s3_server
from support.s3_faults import fault_proxy

from daemon.checkup import State
from daemon.checkup_host import blobs_line, disk_line, packages_line, room_line, sessions_line, torch_line, weights_line
from daemon.config import Config, load
from models.weights import DECODER_FILE, ENCODER_FILE, record
from storage.files import FileBlobs

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).parents[2]
NOWHERE = Path("/nonexistent/.env")


def configured(folder: Path, **settings: str) -> Config:
    values = {
        "DATABASE_URL": "postgresql://nobody@127.0.0.1:9/x",
        "MASKD_BLOB_DIR": str(folder / "blobs"),
        "MASKD_STATE_DIR": str(folder / "state"),
        "MASKD_WEIGHTS_DIR": str(folder / "weights"),
    }
    return load({**values, **settings}, NOWHERE)


@pytest.fixture(scope="module")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.mark.parametrize(("method", "step"), [("POST", "delete"), ("PUT", "put")])
def test_a_token_that_may_not_do_one_thing_is_told_by_what_it_may_not(s3: S3Server, method: str, step: str) -> None:
    bucket = s3.make_bucket()
    with fault_proxy(s3.endpoint) as proxy:
        proxy.answer(403, method=method)
        line = blobs_line(s3.blobs(bucket, proxy.endpoint))
    assert line.state is State.BAD
    assert line.fact.startswith(f"cannot {step} in bucket {bucket} at 127.0.0.1")
    assert "403 AccessDenied" in line.fact
    left = [entry["Key"] for entry in s3.client.list_objects_v2(Bucket=bucket).get("Contents", [])]
    assert all(key in line.advice for key in left), "what could not be deleted is named"
    assert len(left) == (step == "delete")
    assert s3.secret_access_key not in line.fact + line.advice


def test_a_bucket_that_is_not_there_is_told(s3: S3Server) -> None:
    line = blobs_line(s3.blobs("nowhere-of-this-test"))
    assert (line.state, "cannot list in bucket nowhere-of-this-test" in line.fact) == (State.BAD, True)


def test_a_blob_folder_that_is_a_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "blobs").write_text("")
    line = blobs_line(FileBlobs(tmp_path / "blobs"))
    assert (line.state, "MASKD_BLOB_DIR" in line.fact) == (State.BAD, True)


def test_a_blob_folder_is_left_as_it_was(tmp_path: Path) -> None:
    assert blobs_line(FileBlobs(tmp_path / "blobs")).state is State.OK
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


async def test_a_redis_that_is_not_there_is_told(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="needs the extra [redis]")
    line = await sessions_line(configured(tmp_path, MASKD_REDIS_URL="redis://:secret-of-this-test@127.0.0.1:9/0"))
    assert (line.state, "MASKD_REDIS_URL" in line.advice) == (State.BAD, True)
    assert "secret-of-this-test" not in line.fact


@pytest.mark.parametrize(
    ("settings", "state", "fact", "advice"),
    [
        ({"MASKD_VISUAL": "mobilesam"}, State.BAD, "visual by mobilesam: files are missing", "maskd weights pull mobile-sam"),
        ({"MASKD_CONCEPT": "sam3", "MASKD_DEVICE": "cpu"}, State.BAD, "concept by sam3: files are missing", "SAM3_WEIGHTS_PATH"),
        (
            {"SAM3_WEIGHTS_PATH": "/nowhere/sam3.pt", "MASKD_DEVICE": "cpu"},
            State.BAD,
            "concept by sam3: /nowhere/sam3.pt is not there",
            "SAM3_WEIGHTS",
        ),
        ({"MASKD_KINDS": "no_such_kind"}, State.BAD, "there is no kind no_such_kind", "Change that setting"),
        ({"MASKD_KINDS": "segment_visual"}, State.OK, "classical for visual", ""),
        ({"MASKD_KINDS": "convert_image"}, State.OK, "the kinds of this host need none", ""),
        (
            {},
            State.WARN,
            "classical for visual, everything, inpaint; none for concept (sam3), generate (diffusion)",
            "weights pull",
        ),
    ],
)
def test_weights_are_told_by_role(tmp_path: Path, settings: dict[str, str], state: State, fact: str, advice: str) -> None:
    line = weights_line(configured(tmp_path, **settings))
    assert (line.state, fact in line.fact, advice in line.advice) == (state, True, True), line


def test_a_file_that_is_not_what_its_checksum_says_is_told(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in (ENCODER_FILE, DECODER_FILE):
        (folder / name).write_bytes(b"x")
    record(folder / DECODER_FILE, "a" * 64)
    line = weights_line(configured(tmp_path, MASKD_KINDS="segment_visual"))
    assert line.fact == f"visual by mobilesam: damaged: {DECODER_FILE}"
    assert line.advice == "Delete it, then run: maskd weights pull mobile-sam"


def test_a_network_that_is_not_whole_is_told_by_the_files_that_lack(tmp_path: Path) -> None:
    (tmp_path / "weights" / "sam2").mkdir(parents=True)
    (tmp_path / "weights" / "sam2" / "config.json").write_text("{}")
    line = weights_line(configured(tmp_path, MASKD_KINDS="segment_visual"))
    assert (line.state, line.fact) == (State.WARN, "classical for visual; incomplete: sam2 lacks model.safetensors")


def test_a_gpu_that_is_demanded_and_not_there_is_told(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    import torch

    if torch.cuda.is_available():
        pytest.skip("this host has a CUDA device")
    line = torch_line(configured(tmp_path, MASKD_DEVICE="cuda"))
    assert (line.state, "sees no CUDA device" in line.fact) == (State.BAD, True)
    assert line.advice.startswith("Torch ")


def test_a_package_of_our_name_from_elsewhere_is_told_as_it_is_found_on_the_path(tmp_path: Path) -> None:
    info = tmp_path / "python_daemon-3.1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: python-daemon\nVersion: 3.1.2\n")
    (info / "top_level.txt").write_text("daemon\n")
    (info / "RECORD").write_text("daemon/__init__.py,,\n")
    program = (
        "import importlib.metadata as m; from daemon.checkup_host import packages_line as p;"
        "line = p(m.packages_distributions()); print(line.state, line.fact, line.advice, sep='|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": f"{ROOT}:{tmp_path}"}, capture_output=True, text=True, check=True
    )
    state, fact, advice = done.stdout.strip().split("|")
    assert (state, fact) == ("bad", "daemon is also of python-daemon")
    assert advice.startswith("Run: pip uninstall python-daemon;")


def test_here_the_packages_are_ours_alone() -> None:
    assert packages_line(importlib.metadata.packages_distributions()).state is State.OK


def test_a_torchvision_that_is_broken_is_told(tmp_path: Path) -> None:
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    program = (
        "from daemon.checkup_host import torchvision_line as t; line = t(); print(line.state, line.fact, line.advice, sep='|')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"PYTHONPATH": f"{tmp_path}:{ROOT}"}, capture_output=True, text=True, check=True
    )
    state, fact, advice = done.stdout.strip().split("|")
    assert (state, advice) == ("bad", "Run: pip uninstall torchvision")
    assert "operator torchvision::nms does not exist" in fact


@pytest.mark.parametrize(("free", "state"), [(5e9, State.OK), (5e8, State.WARN), (5e7, State.BAD)])
def test_a_disk_that_fills_up_is_told(free: float, state: State) -> None:
    line = room_line({"state": int(free), "weights": 10**12})
    assert (line.state, "MASKD_STATE_DIR" in line.advice) == (state, state is not State.OK)


def test_a_state_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    line = disk_line(configured(tmp_path, MASKD_STATE_DIR="/proc/nowhere"))
    assert line.state is State.BAD
    assert line.fact.startswith("/proc (state) cannot be written to")
