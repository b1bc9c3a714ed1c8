"""What systemd and the shell see of the real program."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemons import ROOT, environment, launch, running
from support.database import Database
from support.site import Site

from daemon.examples import PHOTOS

pytestmark = pytest.mark.system


def maskd(values: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "daemon", *words], env=values, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )


class Manager:
    """The service manager's end of NOTIFY_SOCKET."""

    def __init__(self, folder: Path) -> None:
        self._channel = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._channel.bind(str(folder / "notify"))
        self._channel.settimeout(30)
        self.address = str(folder / "notify")
        self.heard: list[str] = []

    def hear(self, *beginnings: str) -> None:
        """Listen until a line with each of these beginnings has come."""
        while not all(any(line.startswith(beginning) for line in self.heard) for beginning in beginnings):
            self.heard += self._channel.recv(4096).decode().splitlines()

    def first(self, beginning: str) -> int:
        """The place of the first line that begins so."""
        return next(place for place, line in enumerate(self.heard) if line.startswith(beginning))


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made._channel.close()


def test_systemd_hears_of_the_start_then_ready_the_watchdog_and_stopping_in_this_order(
    database: Database, tmp_path: Path, manager: Manager
) -> None:
    values = environment(database.dsn, tmp_path, MASKD_LEASE_SECONDS="2")
    values |= {"NOTIFY_SOCKET": manager.address, "WATCHDOG_USEC": "600000"}
    with running(values, tmp_path) as daemon:
        manager.hear("READY=1")
        assert "STATUS=loading classical for visual on cpu" in manager.heard
        assert manager.first("EXTEND_TIMEOUT_USEC=") < manager.first("READY=1")
        assert daemon.get("/ready")[0] == 200, "ready means that models are loaded and it claims"
        assert "visual" in json.loads(daemon.get("/health")[1])["models"]
        manager.hear("WATCHDOG=1", "STATUS=claiming, by push; no task held")
        assert "STOPPING=1" not in manager.heard
        assert daemon.stop() == 0
    manager.hear("STOPPING=1")
    assert manager.first("STATUS=loading") < manager.first("READY=1") < manager.first("STOPPING=1")
    assert manager.first("READY=1") < manager.first("STATUS=claiming")


def test_while_the_database_is_away_systemd_hears_so_and_is_asked_for_time(tmp_path: Path, manager: Manager) -> None:
    values = environment("postgresql://nobody@127.0.0.1:1/nothing", tmp_path) | {"NOTIFY_SOCKET": manager.address}
    daemon = launch(values, tmp_path)
    try:
        manager.hear("STATUS=waiting for the database")
        place = manager.heard.index("STATUS=waiting for the database")
        manager.hear("EXTEND_TIMEOUT_USEC=")
        assert manager.heard[place + 1].startswith("EXTEND_TIMEOUT_USEC=")
        assert daemon.stop() == 0
        manager.hear("STOPPING=1")
    finally:
        if daemon.process.poll() is None:
            daemon.kill()
    assert "READY=1" not in manager.heard


def test_the_status_line_tells_what_is_held_and_that_it_stops(site: Site, manager: Manager) -> None:
    with site.daemon("hold", NOTIFY_SOCKET=manager.address) as daemon:
        ids = site.queue.insert("hold", site.hold(), None, 2)
        manager.hear("STATUS=claiming, by push; 2 tasks held, 2 running")
        daemon.send(signal.SIGTERM)
        manager.hear("STOPPING=1", "STATUS=stopping; 2 tasks held, 2 running")
        site.let_go()
        assert daemon.process.wait(40) == 0
    assert {row["status"] for row in site.queue.finished(ids)} == {"done"}


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
