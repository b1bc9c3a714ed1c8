"""`maskd demo` as a person starts it: a real process in an empty folder, that ends well and leaves nothing but its gallery."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest

from daemon.examples import EXAMPLES, PHOTOS
from handlers.registry import discover

pytestmark = pytest.mark.system
ROOT = Path(__file__).resolve().parents[2]
END_SECONDS_MAX = 60.0
NEED_WEIGHTS = ("segment_concept", "fill_object")


@dataclass(slots=True, eq=False)
class DemoProcess:
    """A running demo, read line by line; `family` are the processes that it had started when it was last looked at."""

    process: subprocess.Popen[str]
    family: list[psutil.Process] = field(default_factory=list)

    def read_until(self, text: str) -> str:
        """The first line of standard error that holds `text`."""
        assert self.process.stderr is not None
        said = []
        for line in self.process.stderr:
            said.append(line)
            if text in line:
                self.family = psutil.Process(self.process.pid).children(recursive=True)
                return line
        raise AssertionError(f"the demo ended without saying {text!r}:\n{''.join(said)}")

    def end(self) -> tuple[str, str]:
        """What it still says on standard output and error until it ends."""
        return self.process.communicate(timeout=END_SECONDS_MAX)

    def left_running(self) -> list[psutil.Process]:
        """Processes of the family that outlive it by more than ten seconds."""
        assert self.family, "it has a database"
        return psutil.wait_procs(self.family, timeout=10)[1]


@contextmanager
def demo(folder: Path, *options: str) -> Iterator[DemoProcess]:
    """A demo in `folder`, amid settings that would be mistakes for `maskd run`; killed at the end if it still runs."""
    (folder / ".env").write_text("MASKD_NO_SUCH_SETTING=1\nDATABASE_URL=postgresql://127.0.0.1:1/nowhere\n")
    settings = {"PYTHONPATH": str(ROOT), "MASKD_VISUAL": "mock", "MASKD_NONSENSE": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-m", "daemon", "demo", *options],
        cwd=folder,
        env={**os.environ, **settings},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield DemoProcess(process)
        finally:
            process.kill()


@dataclass(frozen=True, slots=True)
class Finished:
    """A demo that has ended by itself."""

    code: int
    stdout: str
    said: str
    left_running: list[psutil.Process]
    folder: Path

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.stdout)
        return found


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """`maskd demo --json`, once for all tests that only look at what it says and leaves."""
    folder = tmp_path_factory.mktemp("demo")
    with demo(folder, "--json") as running:
        note = running.read_until("classical")
        running.read_until("working")
        stdout, _ = running.end()
        return Finished(running.process.returncode, stdout, note, running.left_running(), folder)


def test_the_demo_succeeds_and_prints_one_json_document(finished: Finished) -> None:
    assert finished.code == 0
    assert finished.document()["ok"] is True
    assert finished.stdout.count("\n") == 1


def test_every_example_ends_as_it_must(finished: Finished) -> None:
    tasks = finished.document()["tasks"]
    ends = [(task["title"], "done" if task["status"] == "done" else task["result"]["error"]["code"]) for task in tasks]
    assert ends == [(example.title, example.ends) for example in EXAMPLES if example.kind not in NEED_WEIGHTS]


def test_tasks_that_are_done_name_their_engine_and_time_and_found_something(finished: Finished) -> None:
    for task in finished.document()["tasks"]:
        assert set(task) == {"id", "kind", "title", "status", "engine", "seconds", "result"}
        assert task["seconds"] > 0
        if task["status"] == "done":
            assert task["engine"] in ("classical", "maskd")
            assert task["result"]["labels"] or task["kind"] == "convert_image"
            assert all(Path(file).stat().st_size for file in task["result"]["files"])


def test_the_gallery_shows_every_task(finished: Finished) -> None:
    found = finished.document()
    gallery = Path(found["gallery"])
    assert gallery == finished.folder / "out" / "demo" / "index.html"
    cards = re.findall(r"<article.*?</article>", gallery.read_text(), re.S)
    assert len(cards) == len(found["tasks"])
    for card, task in zip(cards, found["tasks"], strict=True):
        assert "<img" in card
        assert task["id"] in card


def test_a_hub_out_of_reach_is_told_and_leaves_nothing(finished: Finished) -> None:
    assert "the hub cannot be reached (OfflineModeIsEnabled): the classical engine answers" in finished.said
    assert {path.name for path in finished.folder.iterdir()} == {".env", "out"}


def test_nothing_of_the_demo_is_left_running(finished: Finished) -> None:
    assert finished.left_running == []


def test_keep_takes_further_tasks_until_an_interrupt_which_ends_it_well(tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    with demo(tmp_path, "--keep", "--json") as running:
        port = running.read_until("health").partition("127.0.0.1:")[2].partition("/")[0]
        settings, command = submit_line(running.read_until("submit"))
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=10) as answer:
            assert json.load(answer)["status"] == "ok"
        done = subprocess.run(
            [sys.executable, "-m", "daemon", *command],
            cwd=folder,
            env={**os.environ, "PYTHONPATH": str(ROOT), **settings},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        running.process.send_signal(signal.SIGINT)
        running.end()
        assert running.process.returncode == 0
        assert running.left_running() == []
    assert list((folder / "out").glob("*-mask.png"))
    assert not Path(settings["MASKD_BLOB_DIR"]).exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("step", ["applying the migrations", "working"])
def test_a_signal_in_the_middle_stops_everything_and_fails(tmp_path: Path, step: str, number: signal.Signals) -> None:
    with demo(tmp_path) as running:
        running.read_until(step)
        running.process.send_signal(number)
        running.end()
        assert running.process.returncode == 1
        assert running.left_running() == []


def test_every_kind_has_an_example_and_every_example_a_photo() -> None:
    assert set(discover()) == {example.kind for example in EXAMPLES}
    assert all((PHOTOS / example.photo).exists() for example in EXAMPLES)


def submit_line(line: str) -> tuple[dict[str, str], list[str]]:
    """Settings and arguments of the line that --keep suggests."""
    words = shlex.split(line)[1:]
    program = words.index("maskd")
    return dict(word.split("=", 1) for word in words[:program]), words[program + 1 :]
