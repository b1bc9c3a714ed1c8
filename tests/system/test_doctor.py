"""`maskd doctor` as a person and a script call it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest
from rich.console import Console
from support.daemons import ROOT, environment
from support.database import Database
from support.site import Site
from typer.testing import CliRunner

from daemon.checkup import Line, State, not_looked_at
from daemon.checkup_database import NAMES as DATABASE
from daemon.cli import app
from daemon.commands.doctor import show
from storage.base import ConfigurationError

NAMES = [*DATABASE, "wake", "blobs", "sessions", "weights", "torch", "torchvision", "packages", "disk", "host clock"]
KINDS = {"MASKD_KINDS": "segment_visual,convert_image"}
COMMAND = [sys.executable, "-m", "daemon", "doctor"]


def settings(database: Database, folder: Path, **more: str) -> dict[str, str]:
    return environment(database.dsn, folder, MASKD_WEIGHTS_DIR=str(folder / "weights"), **KINDS, **more)


def test_beside_a_daemon_that_runs_nothing_is_bad_and_the_list_is_stable(site: Site, tmp_path: Path) -> None:
    with site.daemon():
        done = subprocess.run(
            [*COMMAND, "--json"], env=settings(site.database, tmp_path), cwd=ROOT, capture_output=True, text=True, check=False
        )
    lines = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line["check"] for line in lines] == NAMES
    assert {tuple(line) for line in lines} == {("check", "state", "fact", "advice")}
    assert [line for line in lines if line["state"] == "bad"] == []


def test_what_is_bad_ends_it_with_1_and_elsewhere_than_on_a_terminal_lines_are_plain(database: Database, tmp_path: Path) -> None:
    database.execute("drop index public.segmentation_results_claim")
    done = subprocess.run(COMMAND, env=settings(database, tmp_path), cwd=ROOT, capture_output=True, text=True, check=False)
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert (done.returncode, done.stderr) == (1, "")
    assert [line[1] for line in lines] == NAMES
    assert [line[:3] for line in lines if line[0] == "bad"] == [["bad", "indexes", "missing: segmentation_results_claim"]]


@pytest.mark.parametrize(
    ("name", "value"), [("MASKD_PORT", "many"), ("MASKD_DB_CA", "/nowhere.crt"), ("MASKD_DB_POOLER", "some")]
)
def test_settings_that_cannot_be_read_are_a_configuration_error(
    database: Database, tmp_path: Path, name: str, value: str
) -> None:
    error = CliRunner().invoke(app, ["doctor"], env=settings(database, tmp_path, **{name: value})).exception
    assert isinstance(error, ConfigurationError)
    assert str(error).startswith(f"{name}: ")


def test_on_a_terminal_it_is_a_table_that_fits(database: Database, tmp_path: Path) -> None:
    database.execute("grant all on public.segmentation_results to anon; drop index public.segmentation_results_claim")
    lines = on_a_terminal(settings(database, tmp_path), 80)
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("✓ connection   direct to 127.0.0.1:")
    assert "✗ grants       anon may DELETE, INSERT, SELECT, TRUNCATE, UPDATE" in lines
    advice = lines[lines.index("✗ indexes      missing: segmentation_results_claim") + 1]
    assert advice.startswith("               → Run in SQL: create index")
    assert re.fullmatch(r"\d+ ok, \d+ warn, 2 bad", lines[-1])


def test_a_wider_terminal_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_terminal=True, color_system=None, width=120)
    show(console, [Line("blobs", State.BAD, "x" * 100, "y" * 100), Line("disk", State.OK, "fine")], as_json=False)
    shown = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    assert shown == [f"✗ blobs {'x' * 100}", f"        → {'y' * 100}", "✓ disk  fine", "", "1 ok, 1 bad"]


def test_what_could_not_be_looked_at_for_one_reason_is_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(force_terminal=True, color_system=None, width=80)
    show(
        console,
        [Line("connection", State.BAD, "none"), *not_looked_at(["tls", "schema", "clock"], "no connection")],
        as_json=False,
    )
    assert [line.rstrip() for line in capsys.readouterr().out.splitlines()] == [
        "✗ connection none",
        "! tls        not looked at: no connection; nor schema, clock",
        "             → Mend that first, then ask again.",
        "",
        "3 warn, 1 bad",
    ]


def on_a_terminal(values: dict[str, str], columns: int) -> list[str]:
    """What a person sees in the end, without colours and without the spinner."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 60, columns, 0, 0))
    shown = b""
    with subprocess.Popen(
        COMMAND, cwd=ROOT, env={**values, "TERM": "xterm", "COLUMNS": str(columns)}, stdout=theirs, stderr=theirs
    ):
        os.close(theirs)
        with contextlib.suppress(OSError):  # how a terminal ends
            while part := os.read(ours, 65536):
                shown += part
    os.close(ours)
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode()).replace("\r", "\n")
    lines = [line.rstrip() for line in text.splitlines() if line.strip()]
    return lines[next(place for place, line in enumerate(lines) if " connection " in line) :]
