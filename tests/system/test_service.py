"""What systemd and the shell see of the real program."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from support.daemons import ROOT, environment, running
from support.database import Database

from daemon.examples import PHOTOS

pytestmark = pytest.mark.system


def maskd(values: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon", *words], env=values, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


def test_systemd_hears_ready_the_watchdog_and_stopping_in_this_order(database: Database, tmp_path: Path) -> None:
    channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    channel.bind(str(tmp_path / "notify"))
    channel.settimeout(30)
    values = environment(database.dsn, tmp_path, MASKD_LEASE_SECONDS="2")
    values |= {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "600000"}
    heard = []
    with running(values, tmp_path) as daemon:
        while "WATCHDOG=1" not in heard or "READY=1" not in heard:
            heard += channel.recv(4096).decode().splitlines()
        assert daemon.stop() == 0
    channel.settimeout(1)
    while "STOPPING=1" not in heard:
        heard += channel.recv(4096).decode().splitlines()
    channel.close()
    assert heard.index("READY=1") < heard.index("STOPPING=1")


def test_submit_waits_and_writes_the_masks_to_the_folder(database: Database, tmp_path: Path) -> None:
    values = environment(database.dsn, tmp_path)
    with running(values, tmp_path):
        photo = str(PHOTOS / "chelsea.jpg")
        answer = maskd(values, "submit", photo, "--box", "60,10,380,290", "--wait", "--out", str(tmp_path / "out"), "--json")
    assert answer.returncode == 0, answer.stderr
    row = json.loads(answer.stdout)
    assert row["status"] == "done"
    assert sorted(Path(file).suffix for file in row["files"]) == [".json", ".png"]
    assert all(Path(file).stat().st_size > 100 for file in row["files"])


def test_submit_of_what_is_not_an_image_exits_1_with_the_sentence(database: Database, tmp_path: Path) -> None:
    values = environment(database.dsn, tmp_path)
    (tmp_path / "note.jpg").write_text("no image")
    with running(values, tmp_path):
        answer = maskd(values, "submit", str(tmp_path / "note.jpg"), "--box", "1,1,5,5", "--wait")
    assert answer.returncode == 1
    assert "image_invalid" in answer.stdout


def test_status_shows_the_queue_to_people_and_to_scripts(database: Database, tmp_path: Path) -> None:
    values = environment(database.dsn, tmp_path)
    database.execute("""
        insert into auth.users (id) values ('00000000-0000-0000-0000-000000000001');
        insert into public.projects (id, user_id)
          values ('00000000-0000-0000-0000-000000000002', '00000000-0000-0000-0000-000000000001');
        insert into public.segmentation_results (project_id, kind, source_image_url)
          values ('00000000-0000-0000-0000-000000000002', 'segment_visual', 'uploads/00000000-0000-0000-0000-000000000001/a.jpg'),
                 ('00000000-0000-0000-0000-000000000002', 'no_such_kind', 'x')""")
    shown = maskd(values, "status")
    assert shown.returncode == 0, shown.stderr
    assert "no live worker serves segment_visual" in shown.stdout
    assert "kind_unknown" in shown.stdout
    found = json.loads(maskd(values, "status", "--json").stdout)
    assert found["tasks"][0]["count"] == 1


def test_retry_puts_failed_tasks_back(database: Database, tmp_path: Path) -> None:
    values = environment(database.dsn, tmp_path)
    assert "0 put back" in maskd(values, "retry", "--error", "internal").stdout
    assert maskd(values, "retry").returncode == 2, "neither tasks nor a code named"


def test_no_command_needs_a_gpu_library(tmp_path: Path) -> None:
    program = "import sys, daemon.main, daemon.cli, handlers.registry as r, storage; r.discover(); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert {"torch", "transformers", "onnxruntime", "diffusers"}.isdisjoint(loaded.split())
