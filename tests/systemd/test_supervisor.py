"""maskd under a real supervisord, by the configuration that is shipped: what is restarted, what is not, and who is waited for."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from configparser import RawConfigParser
from contextlib import contextmanager
from pathlib import Path

import pytest
from support.daemons import ROOT, wait_until
from support.database import Database
from support.kinds_daemon import PROGRAM
from support.site import Site, site_on

from daemon.config import Config

SUPERVISOR = ROOT / "systemd" / "supervisor"
NEEDED = "supervisord is not installed (Debian: apt install supervisor)"

needs_supervisord = pytest.mark.skipif(shutil.which("supervisord") is None, reason=NEEDED)


@pytest.fixture
def site(database: Database, tmp_path: Path) -> Iterator[Site]:
    with site_on(database, tmp_path) as made:
        yield made


def program(name: str) -> dict[str, str]:
    """The section of a shipped configuration."""
    parser = RawConfigParser(inline_comment_prefixes=(";",))
    parser.read(SUPERVISOR / name)
    return dict(parser["program:maskd"])


class Supervisord:
    """A supervisord that runs the shipped program with another command, folder and settings."""

    def __init__(self, folder: Path, name: str, command: str, settings: Mapping[str, str]) -> None:
        self._folder, self._conf = folder, folder / "supervisord.conf"
        section = {key: value for key, value in program(name).items() if key not in ("user", "environment")}
        section |= {"command": command, "directory": str(ROOT), "stdout_logfile": str(folder / "maskd-%(process_num)d.log")}
        self._conf.write_text(
            f"[supervisord]\nnodaemon=true\nuser={os.environ.get('USER') or 'root'}\nlogfile={folder}/supervisord.log\n"
            f"pidfile={folder}/supervisord.pid\nchildlogdir={folder}\n"
            f"[unix_http_server]\nfile={folder}/s\n[supervisorctl]\nserverurl=unix://{folder}/s\n"
            "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory = supervisor.rpcinterface:make_main_rpcinterface\n"
            "[program:maskd]\n" + "".join(f"{key}={value}\n" for key, value in section.items())
        )
        self.settings = dict(settings)

    @contextmanager
    def running(self) -> Iterator[Supervisord]:
        with (self._folder / "console.log").open("wb") as sink:
            process = subprocess.Popen(
                ["supervisord", "-c", self._conf], cwd=self._folder, env=self.settings, stdout=sink, stderr=sink
            )
        try:
            yield self
        finally:
            process.terminate()  # it stops its programs first
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                os.kill(self.pid(), signal.SIGKILL)
                process.kill()

    def control(self, *words: str) -> str:
        done = subprocess.run(
            ["supervisorctl", "-c", self._conf, *words], capture_output=True, text=True, timeout=90, check=False
        )
        return done.stdout

    def state(self) -> str:
        """RUNNING, EXITED, …; nothing while supervisord is not up."""
        found = re.search(r"(?m)^maskd\S*\s+([A-Z]+)", self.control("status"))
        return found[1] if found else ""

    def pid(self) -> int:
        found = re.search(r"pid (\d+)", self.control("status"))
        return int(found[1]) if found else 0

    def log(self) -> str:
        file = self._folder / "maskd-0.log"
        return file.read_text() if file.exists() else ""


@needs_supervisord
@pytest.mark.system
def test_a_killed_daemon_is_started_again_and_one_that_drains_is_waited_for(site: Site, tmp_path: Path) -> None:
    folder = tmp_path / "supervisor"
    folder.mkdir()
    command = " ".join([sys.executable, *PROGRAM, "run"])
    with Supervisord(folder, "maskd.conf", command, site.settings(MASKD_TEST_KINDS="hold")).running() as supervisord:
        wait_until("it claims", lambda: "daemon.ready" in supervisord.log())
        first = supervisord.pid()
        os.kill(first, signal.SIGKILL)
        wait_until("it claims again", lambda: supervisord.log().count("daemon.ready") == 2)
        assert supervisord.pid() not in (0, first)

        ids = site.queue.insert("hold", site.hold(), None, 1)
        wait_until("a task has begun", lambda: site.begun(ids) == set(ids))
        stop = subprocess.Popen(["supervisorctl", "-c", folder / "supervisord.conf", "stop", "maskd"], stdout=subprocess.DEVNULL)
        wait_until("it drains", lambda: "drain.begin" in supervisord.log())
        assert supervisord.state() == "STOPPING"
        site.let_go()
        assert stop.wait(60) == 0
        assert site.queue.row(ids[0])["status"] == "done"
        assert supervisord.state() == "STOPPED"


@needs_supervisord
@pytest.mark.system
def test_a_mistake_in_the_settings_is_not_tried_again(tmp_path: Path) -> None:
    settings = {"PATH": os.environ["PATH"], "MASKD_PORT": "0"}
    supervisord = Supervisord(tmp_path, "maskd.conf", f"{sys.executable} -m daemon run", settings)
    with supervisord.running():
        wait_until("it has ended", lambda: supervisord.state() == "EXITED")
        assert supervisord.state() == "EXITED"
    assert supervisord.log().count("DATABASE_URL is missing") == 1
    assert "exit status 78; expected" in (tmp_path / "supervisord.log").read_text()


@pytest.mark.parametrize("name", ["maskd.conf", "maskd-gpus.conf"])
def test_supervisord_waits_longer_than_the_drain_takes_and_restarts_like_systemd(name: str) -> None:
    section = program(name)
    assert int(section["stopwaitsecs"]) >= Config.model_fields["drain_seconds"].default + 15
    assert (section["autorestart"], section["exitcodes"], section["startsecs"]) == ("unexpected", "78", "0")
    assert section["user"] == "maskd"


def test_each_gpu_has_its_port_its_state_and_nothing_but_itself() -> None:
    environment = program("maskd-gpus.conf")["environment"]
    for number in (0, 3, 12):
        values = dict(re.findall(r'(\w+)="([^"]*)"', environment % {"process_num": number}))
        assert values["MASKD_PORT"] == str(8000 + number)
        assert values["CUDA_VISIBLE_DEVICES"] == str(number)
        assert values["MASKD_STATE_DIR"].endswith(f"/gpu{number}")
