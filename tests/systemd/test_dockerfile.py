"""The Dockerfile, as far as can be told without an engine: its instructions, what it copies, who it runs as, its health check."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import anyio
import pytest

from daemon.config import known_names
from daemon.server import Server
from daemon.session_routes import Access

ROOT = Path(__file__).resolve().parents[2]
DOCKERFILE = ROOT / "systemd" / "Dockerfile"
KNOWN = {
    "ARG",
    "FROM",
    "WORKDIR",
    "RUN",
    "COPY",
    "ENV",
    "VOLUME",
    "USER",
    "EXPOSE",
    "HEALTHCHECK",
    "STOPSIGNAL",
    "ENTRYPOINT",
    "CMD",
}


def instructions() -> list[tuple[str, str]]:
    """Each instruction and what follows it, comments left out and continued lines joined."""
    lines = [line for line in DOCKERFILE.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = re.sub(r"\s*\\\n\s*", " ", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines()]
    return [(word, rest) for word, _, rest in pairs]


def last(word: str) -> str:
    return [rest for each, rest in instructions() if each == word][-1]


def test_every_instruction_is_one_of_dockers() -> None:
    assert {word for word, _ in instructions()} <= KNOWN


def test_what_is_copied_is_there_and_not_ignored_and_all_that_the_wheel_needs() -> None:
    copied = {name for word, rest in instructions() if word == "COPY" and "--from" not in rest for name in rest.split()[:-1]}
    ignore = DOCKERFILE.with_name("Dockerfile.dockerignore").read_text().splitlines()
    assert all((ROOT / name).exists() for name in copied)
    assert {line[1:] for line in ignore if line.startswith("!")} == copied
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = project["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert {*wheel["packages"], *wheel["force-include"], *project["project"]["license-files"]} < copied


def test_it_runs_as_nobody_in_particular_under_a_python_that_maskd_takes() -> None:
    assert last("USER") == "maskd"
    assert (json.loads(last("ENTRYPOINT")), json.loads(last("CMD"))) == (["maskd"], ["run"])
    version = re.fullmatch(r"PYTHON=3\.(\d+)", next(rest for word, rest in instructions() if word == "ARG"))
    assert version is not None
    assert 11 <= int(version[1]) <= 13


def test_it_sets_only_what_maskd_knows_and_no_secret() -> None:
    names = set(re.findall(r"(\w+)=", last("ENV")))
    assert {name for name in names if name.startswith("MASKD_")} <= known_names()
    assert not {name for name in names if "KEY" in name or "SECRET" in name or name == "DATABASE_URL"}


@pytest.mark.parametrize(
    ("device", "extras", "wanted"),
    [("cpu", "", "/src"), ("cpu", "redis", "/src[redis]"), ("cuda", "", "/src[torch]"), ("cuda", "heif", "/src[torch,heif]")],
)
def test_the_device_chooses_the_extras(device: str, extras: str, wanted: str) -> None:
    script = next(rest for word, rest in instructions() if word == "RUN" and "DEVICE" in rest)
    choose, _, install = script.partition("&&")
    target = last_word(install)
    done = subprocess.run(
        ["sh", "-c", f'{choose}; echo "{target}"'],
        env={"DEVICE": device, "EXTRAS": extras},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == wanted


def last_word(command: str) -> str:
    """The last word of a command, without its quotes and with its variables."""
    return command.rsplit('"', 2)[-2]


@pytest.mark.anyio
async def test_its_health_check_passes_while_the_daemon_answers_and_then_no_more() -> None:
    command = json.loads(last("HEALTHCHECK").partition("CMD ")[2])
    server = Server("127.0.0.1", 0, Access("key"), lambda: {"status": "starting"})
    await server.start()
    check = [sys.executable, *command[1:]]
    environment = {**os.environ, "MASKD_PORT": str(server.port)}
    assert (await anyio.run_process(check, env=environment, check=False)).returncode == 0
    await server.stop()
    assert (await anyio.run_process(check, env=environment, check=False)).returncode != 0
