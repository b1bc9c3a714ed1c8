"""systemd/install.sh below a folder of its own: what it leaves there, and that running it again changes nothing."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTALL = ROOT / "systemd" / "install.sh"
UNITS = "etc/systemd/system"
WANTED = f"{UNITS}/multi-user.target.wants"

needs_systemctl = pytest.mark.skipif(
    shutil.which("systemctl") is None, reason="systemctl is not installed (Debian: apt install systemd)"
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A root with an environment in place: the one that runs the tests."""
    (tmp_path / "opt/maskd").mkdir(parents=True)
    (tmp_path / "opt/maskd/.venv").symlink_to(sys.prefix)
    return tmp_path


def install(root: Path, *words: str, code: int = 0) -> str:
    """Run the script; what it says."""
    done = subprocess.run(
        [INSTALL, "--root", root, "--no-pip", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def everything(root: Path) -> dict[str, tuple[int, float, str]]:
    """Mode, time and content of each file, link and folder, but for the environment."""
    found = {}
    for path in sorted(root.rglob("*")):
        if ".venv" not in path.relative_to(root).parts:
            what = os.readlink(path) if path.is_symlink() else path.read_bytes().hex() if path.is_file() else "a folder"
            stat = path.lstat()
            found[str(path.relative_to(root))] = (stat.st_mode, stat.st_mtime, hashlib.sha256(what.encode()).hexdigest())
    return found


def enabled(root: Path) -> set[str]:
    folder = root / WANTED
    return {file.name for file in folder.iterdir()} if folder.is_dir() else set()


def fill_in(root: Path) -> None:
    """Settings with which a daemon could start."""
    settings = root / "etc/maskd/maskd.env"
    text = settings.read_text().replace("DATABASE_URL=\n", "DATABASE_URL=postgresql://u:p@127.0.0.1/queue\n", 1)
    settings.write_text(text.replace("#MASKD_BLOB_DIR=", "MASKD_BLOB_DIR=", 1))


@needs_systemctl
@pytest.mark.parametrize("words", [(), ("--gpus", "2"), ("--supervisor",), ("--supervisor", "--gpus", "3")], ids=" ".join)
def test_the_second_run_changes_nothing(root: Path, words: tuple[str, ...]) -> None:
    assert "wrote" in install(root, *words)
    before = everything(root)
    again = install(root, *words)
    assert "wrote" not in again
    assert everything(root) == before


@needs_systemctl
def test_it_puts_the_units_in_place_and_enables_one_service(root: Path) -> None:
    install(root)
    for name in ("maskd.service", "maskd@.service"):
        assert (root / UNITS / name).read_bytes() == (ROOT / "systemd" / name).read_bytes()
    assert enabled(root) == {"maskd.service"}
    assert (root / "etc/maskd/maskd.env").stat().st_mode & 0o777 == 0o640
    assert os.readlink(root / "var/lib/maskd/.env") == "/etc/maskd/maskd.env"
    assert os.access(root / "usr/local/bin/maskd", os.X_OK)


@needs_systemctl
def test_one_service_per_gpu_and_one_for_all_replace_each_other(root: Path) -> None:
    install(root)
    assert "disabling maskd.service" in install(root, "--gpus", "3")
    assert enabled(root) == {"maskd@0.service", "maskd@1.service", "maskd@2.service"}
    assert "disabling maskd@1.service maskd@2.service" in install(root, "--gpus", "1")
    assert enabled(root) == {"maskd@0.service"}
    install(root)
    assert enabled(root) == {"maskd.service"}


@needs_systemctl
def test_what_the_settings_lack_is_said_in_the_daemons_own_words(root: Path) -> None:
    said = install(root)
    assert "DATABASE_URL is missing" in said
    assert "R2_ENDPOINT, R2_ACCESS_KEY_ID and R2_SECRET_ACCESS_KEY are needed" in said
    fill_in(root)
    assert install(root).strip() == "maskd: everything is in place"


@needs_systemctl
def test_settings_that_are_there_are_kept(root: Path) -> None:
    (root / "etc/maskd").mkdir(parents=True)
    (root / "etc/maskd/maskd.env").write_text("DATABASE_URL=postgresql://u:secret@h/d\nMASKD_BLOB_DIRR=/x\n")
    said = install(root)
    assert "did you mean MASKD_BLOB_DIR?" in said
    assert "secret" not in said
    assert (root / "etc/maskd/maskd.env").read_text().endswith("MASKD_BLOB_DIRR=/x\n")


@needs_systemctl
def test_services_of_other_names_are_left_alone(root: Path) -> None:
    (root / UNITS).mkdir(parents=True)
    (root / WANTED).mkdir()
    (root / UNITS / "maskd-backup.service").write_text("[Service]\nExecStart=/bin/true\n[Install]\nWantedBy=multi-user.target\n")
    (root / WANTED / "maskd-backup.service").symlink_to("../maskd-backup.service")
    install(root, "--gpus", "2")
    install(root)
    assert enabled(root) == {"maskd.service", "maskd-backup.service"}


def test_secrets_that_everybody_may_read_are_told_of(root: Path) -> None:
    said = install(root, "--supervisor")
    assert "warning" not in said
    assert (root / "etc/maskd/maskd.env").stat().st_mode & 0o777 == 0o640
    assert [file.name for file in (root / "etc/maskd").iterdir()] == ["maskd.env"]
    (root / "etc/maskd/maskd-0.env").write_text("R2_SECRET_ACCESS_KEY=secret\n")
    (root / "etc/maskd/maskd-0.env").chmod(0o644)
    assert f"warning: everybody may read {root}/etc/maskd/maskd-0.env" in install(root, "--supervisor")


def test_modules_that_lie_where_it_is_started_are_not_run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "with spaces" / "$(touch x)"
    folder.mkdir(parents=True)
    for module in ("venv", "ensurepip", "torch", "pip"):
        (folder / f"{module}.py").write_text("import pathlib; pathlib.Path(__file__).with_suffix('.ran').touch()\n")
    monkeypatch.chdir(folder)
    install(root, "--supervisor")
    assert not [*folder.glob("*.ran")]
    assert not (folder / "x").exists()


def test_supervisor_gets_as_many_processes_as_there_are_gpus(root: Path) -> None:
    install(root, "--supervisor")
    conf = root / "etc/supervisor/conf.d/maskd.conf"
    assert conf.read_bytes() == (ROOT / "systemd/supervisor/maskd.conf").read_bytes()
    install(root, "--supervisor", "--gpus", "4")
    assert re.findall(r"(?m)^numprocs=.*", conf.read_text()) == ["numprocs=4"]
    assert not (root / "etc/systemd").exists()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--gpus",), "--gpus needs a value"),
        (("--gpus", "none"), "--gpus takes a number from 1 to 99, not none"),
        (("--gpu", "1"), "there is no option --gpu"),
    ],
)
def test_an_option_that_is_wrong_is_named_and_nothing_is_done(root: Path, words: tuple[str, ...], sentence: str) -> None:
    before = everything(root)
    assert sentence in install(root, *words, code=1)
    assert everything(root) == before


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="shellcheck is not installed (Debian: apt install shellcheck)")
def test_shellcheck_finds_nothing_in_the_scripts() -> None:
    scripts = [*ROOT.glob("systemd/*.sh"), ROOT / ".ci/run"]
    done = subprocess.run(["shellcheck", *scripts], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(
    not os.environ.get("MASKD_TEST_INSTALL"), reason="takes minutes and a package index: set MASKD_TEST_INSTALL=1 to run it"
)
@needs_systemctl
@pytest.mark.timeout(900)
def test_a_fresh_environment_is_made_once_and_holds_maskd(tmp_path: Path) -> None:
    for _ in range(2):
        done = subprocess.run([INSTALL, "--root", tmp_path], capture_output=True, text=True, timeout=800, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "installing" not in done.stdout, "the second run"
    program = tmp_path / "opt/maskd/.venv/bin/maskd"
    shown = subprocess.run([program, "--help"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=True)
    assert "migrate" in shown.stdout
