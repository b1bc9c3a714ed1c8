"""A device that answers nothing any more: the process ends with its own exit code, and only what really kills is given up."""

from __future__ import annotations

from pathlib import Path

from support.daemons import DaemonProcess, launch, wait_until
from support.kinds_daemon import KINDS_VARIABLE, PROGRAM
from support.site import Site

LIVES_MAX = 8


def until_it_dies(site: Site, folder: Path) -> DaemonProcess:
    """A daemon that ran until it ended by itself."""
    daemon = launch(site.settings(**{KINDS_VARIABLE: "lose noop"}), folder, PROGRAM)
    try:
        daemon.process.wait(60)
    finally:
        if daemon.process.poll() is None:
            daemon.kill()
    return daemon


def test_a_lost_device_ends_the_process_with_76_and_the_culprit_alone_is_given_up(site: Site, tmp_path: Path) -> None:
    healthy = site.queue.insert("lose", {}, None, 5)
    (culprit,) = site.queue.insert("lose", {"lose": True})
    lives = 0
    while site.queue.row(culprit)["status"] != "error":
        daemon = until_it_dies(site, tmp_path)
        assert daemon.process.returncode == 76, daemon.log.read_text()
        assert "CUDA error: an illegal memory access" in daemon.events("infer.device_lost")[0]["reason"]
        lives += 1
        assert lives < LIVES_MAX
    row = site.queue.row(culprit)
    assert (row["error"]["code"], row["deaths"]) == ("poison", 3)
    with site.daemon("lose", "noop"):
        rows = site.queue.finished(healthy)
    assert {(row["status"], row["attempts"]) for row in rows} == {("done", 1)}
    assert site.queue.ends([*healthy, culprit]) == {"done": 5, "error": 1}


def test_what_was_not_on_the_device_is_given_back_at_once(site: Site, tmp_path: Path) -> None:
    (culprit,) = site.queue.insert("lose", {"lose": True})
    others = site.queue.insert("noop", {}, None, 3)
    daemon = until_it_dies(site, tmp_path)
    assert daemon.process.returncode == 76
    wait_until("nothing is held", lambda: not {row["status"] for row in site.queue.rows([culprit, *others])} & {"processing"}, 20)
    assert site.queue.row(culprit)["deaths"] == 1
    assert {row["deaths"] for row in site.queue.rows(others)} == {0}
