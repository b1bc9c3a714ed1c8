"""What an operator reads where torch cannot be used: in processes whose packages are missing, old or broken for real."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
REQUIRE = "torch_device.require(); print('usable')"
needs_torch = pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("torch", "transformers"))), reason="needs the extra [torch]: make torch"
)


def said(program: str, paths: Sequence[Path], *, alone: bool = False) -> str:
    """What the program prints, or the sentence it ends with; those paths come before, or `alone` are, what is installed."""
    lines = (
        "from models import torch_device",
        "from models.weights import WeightsError",
        f"try: {program}",
        "except WeightsError as error: print(error)",
    )
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*paths, ROOT]))}
    command = [sys.executable, *(["-S"] if alone else []), "-c", "\n".join(lines)]
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


def package(folder: Path, name: str, source: str, version: str) -> None:
    """A distribution as pip leaves it behind."""
    (folder / name).mkdir()
    (folder / name / "__init__.py").write_text(source)
    (folder / f"{name}-{version}.dist-info").mkdir()
    (folder / f"{name}-{version}.dist-info" / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def installed_without(folder: Path, names: Sequence[str]) -> Path:
    """All that is installed here but for those."""
    folder.mkdir(exist_ok=True)
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.name.split("-")[0] not in names and entry.suffix != ".pth":
            (folder / entry.name).symlink_to(entry)
    return folder


def torch_like(folder: Path, version: str, cuda: str | None) -> None:
    """As much of torch as is asked about CUDA: a build for that version of it, on a host without a device."""
    source = f"""
        class version: cuda = {cuda!r}
        class cuda: is_available = staticmethod(lambda: False)
        __version__ = {version!r}
    """
    package(folder, "torch", "\n".join(line.strip() for line in source.splitlines()), version)


@pytest.mark.parametrize(
    ("names", "sentence"),
    [
        (("torch", "transformers"), "torch and transformers are not installed; run: make torch"),
        (("transformers",), "transformers is not installed; run: make torch"),
    ],
    ids=["both", "one"],
)
def test_what_is_not_installed_is_named_with_the_command_that_installs_it(
    tmp_path: Path, names: tuple[str, ...], sentence: str
) -> None:
    if "torch" not in names and importlib.util.find_spec("torch") is None:
        pytest.skip("needs the extra [torch]: make torch")
    assert said(REQUIRE, [installed_without(tmp_path, names)], alone=True) == sentence


def test_without_torch_there_are_no_devices_and_nothing_fails(tmp_path: Path) -> None:
    without = installed_without(tmp_path, ("torch", "transformers"))
    assert said("print(torch_device.cuda_devices(), torch_device.missing())", [without], alone=True) == (
        "[] ['torch', 'transformers']"
    )


def test_a_torch_that_is_too_old_is_refused(tmp_path: Path) -> None:
    torch_like(tmp_path, "2.6.1", None)
    package(tmp_path, "transformers", "", "5.0.0")
    assert said(REQUIRE, [tmp_path]) == "torch 2.6.1 is too old: 2.7 or later is needed; run: pip install -U torch"


def test_a_version_is_read_as_numbers_whatever_build_it_is(tmp_path: Path) -> None:
    torch_like(tmp_path, "2.10.0+cu130", "13.0")
    package(tmp_path, "transformers", "", "5.0.0")
    without = installed_without(tmp_path / "site", ("torch", "transformers", "torchvision"))
    assert said(REQUIRE, [tmp_path, without], alone=True) == "usable"


@needs_torch
def test_what_is_installed_here_is_usable(tmp_path: Path) -> None:
    without = installed_without(tmp_path, ("torchvision",))
    assert said(REQUIRE, [without], alone=True) == "usable"


@needs_torch
def test_a_torchvision_that_cannot_be_imported_is_named_with_the_command_that_removes_it(tmp_path: Path) -> None:
    package(tmp_path, "torchvision", "raise RuntimeError('operator torchvision::nms does not exist')", "0.29.2")
    assert said(REQUIRE, [tmp_path]) == (
        "torchvision is broken (operator torchvision::nms does not exist) and maskd does not need it; "
        "run: pip uninstall torchvision"
    )


@needs_torch
def test_a_torchvision_that_works_is_left_alone(tmp_path: Path) -> None:
    package(tmp_path, "torchvision", "", "0.29.2")
    assert said(REQUIRE, [tmp_path]) == "usable"


@pytest.mark.parametrize(
    ("version", "cuda", "sentence"),
    [
        (
            "2.13.0+cpu",
            None,
            "torch 2.13.0+cpu is a build without CUDA; run: pip uninstall -y torch && pip install torch",
        ),
        (
            "2.13.0+cu130",
            "13.0",
            "torch 2.13.0+cu130 was built for CUDA 13.0 but sees no device: is there an NVIDIA driver for it (nvidia-smi), "
            "and is the device visible (CUDA_VISIBLE_DEVICES)?",
        ),
    ],
    ids=["the wheel", "the driver"],
)
def test_why_there_is_no_cuda_is_told_by_the_wheel_or_the_driver(
    tmp_path: Path, version: str, cuda: str | None, sentence: str
) -> None:
    torch_like(tmp_path, version, cuda)
    assert said("print(torch_device.why_no_cuda())", [tmp_path]) == sentence


@needs_torch
def test_the_build_that_is_installed_here_answers_the_same_way() -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this host has a CUDA device")
    told = said("print(torch_device.cuda_devices(), torch_device.why_no_cuda())", [])
    assert told.startswith(f"[] torch {torch.__version__} ")
