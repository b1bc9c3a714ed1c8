"""The service units: clean and hardened by systemd's own judgement, and in step with the daemon's settings and exit codes."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from configparser import RawConfigParser
from pathlib import Path

import pytest

from daemon.config import Config, known_names

UNITS = Path(__file__).resolve().parents[2] / "systemd"
SERVICE = UNITS / "maskd.service"
PER_GPU = UNITS / "maskd@.service"
EXPOSURE_MAX = 40  # tenths: systemd's scale ends at 10.0, and 4.0 is where "OK" begins

needs_systemd_analyze = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed (Debian: apt install systemd)"
)


class Unit(RawConfigParser):
    """A unit file; of a name that stands there several times the last value counts."""

    def __init__(self, file: Path) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#", ";"))
        self.optionxform = str  # type: ignore[assignment,method-assign]
        self.read_string(file.read_text())

    def of_service(self, name: str) -> str:
        return self.get("Service", name)


@pytest.fixture(params=["maskd.service", "maskd@3.service"])
def runnable(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A unit with a program that exists here, since verify looks for it; of the template, GPU 3's."""
    unit = tmp_path / str(request.param)
    template = re.sub(r"@\d+", "@", unit.name)
    unit.write_text((UNITS / template).read_text().replace("/opt/maskd/.venv/bin/maskd run", "/bin/true"))
    return unit


@needs_systemd_analyze
def test_systemd_finds_nothing_wrong_with_the_unit(runnable: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", runnable], capture_output=True, text=True, check=False)
    said = [line for line in (done.stdout + done.stderr).splitlines() if "maskd" in line]
    assert (done.returncode, said) == (0, [])


@needs_systemd_analyze
def test_the_service_is_exposed_to_4_of_10_at_most(runnable: Path) -> None:
    command = ["systemd-analyze", "security", "--offline=true", f"--threshold={EXPOSURE_MAX}", "--no-pager", runnable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, "\n".join((done.stdout + done.stderr).splitlines()[-3:])


def test_the_unit_per_gpu_differs_in_its_gpu_port_state_settings_and_names_only() -> None:
    def lines(file: Path) -> set[str]:
        return {line for line in file.read_text().splitlines() if not line.startswith("#")}

    assert lines(SERVICE) - lines(PER_GPU) == {
        "Description=maskd, the mask daemon",
        "ExecStart=/opt/maskd/.venv/bin/maskd run",
        "StateDirectory=maskd",
        "Environment=PYTHONUNBUFFERED=1 HOME=%S/maskd MASKD_STATE_DIR=%S/maskd",
        "SyslogIdentifier=maskd",
    }
    own = {line.partition("=")[0] for line in lines(PER_GPU) - lines(SERVICE)}
    assert own == {"Description", "ExecStart", "EnvironmentFile", "StateDirectory", "Environment", "SyslogIdentifier"}


@pytest.mark.parametrize(("given", "port"), [({}, "8003"), ({"MASKD_PORT": "9100"}, "9103")])
def test_the_unit_of_gpu_3_listens_at_the_third_port_after(given: dict[str, str], port: str) -> None:
    line = Unit(PER_GPU).of_service("ExecStart").replace("%i", "3").replace("$$", "$")
    assert line.endswith("exec /opt/maskd/.venv/bin/maskd run'")
    program, flag, script = shlex.split(line.replace("exec /opt/maskd/.venv/bin/maskd run", "exec printenv MASKD_PORT"))
    done = subprocess.run(
        [program, flag, script], env={"PATH": "/usr/bin:/bin", **given}, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == port


def test_systemd_waits_longer_than_the_drain_takes() -> None:
    stop_seconds = int(Unit(SERVICE).of_service("TimeoutStopSec"))
    assert stop_seconds >= Config.model_fields["drain_seconds"].default + 15


@pytest.mark.parametrize("file", [SERVICE, PER_GPU], ids=lambda file: file.name)
def test_a_mistake_in_the_settings_is_not_restarted_and_everything_else_is(file: Path) -> None:
    unit = Unit(file)
    assert unit.of_service("Restart") == "always"
    assert unit.of_service("RestartPreventExitStatus") == "78"
    assert unit.of_service("SuccessExitStatus") == "75 76"
    assert unit.get("Unit", "StartLimitIntervalSec") == "0"


def test_the_unit_and_the_example_name_only_settings_that_exist() -> None:
    named = set(re.findall(r"(?m)^#?([A-Z][A-Z0-9_]+)=", (UNITS / "maskd.env.example").read_text()))
    for file in (SERVICE, PER_GPU, *UNITS.glob("supervisor/*.conf")):
        named |= set(re.findall(r"\b(MASKD_\w+)=", file.read_text()))
    assert named - known_names() == set()


def test_the_example_shows_no_secret() -> None:
    secrets = re.findall(r"(?m)^#?(\w*(?:SECRET|KEY)\w*)=(.+)$", (UNITS / "maskd.env.example").read_text())
    assert secrets == []
