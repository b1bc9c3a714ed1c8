"""The service manager's socket: what is said there, and that one who does not listen stops no work."""

from __future__ import annotations

import socket
from contextlib import suppress
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from daemon import systemd


def test_what_is_said_arrives_as_one_datagram(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        systemd.notify("READY=1", "STATUS=claiming")
        assert manager.recv(4096) == b"READY=1\nSTATUS=claiming"


@pytest.mark.parametrize("manager", ["that is gone", "that reads nothing"])
def test_a_manager_that_does_not_listen_is_a_line_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, manager: str
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        if manager == "that reads nothing":
            deaf.bind(str(tmp_path / "notify"))
            other.setblocking(False)
            with suppress(BlockingIOError):
                while True:
                    other.sendto(b"x" * 4096, str(tmp_path / "notify"))
        with capture_logs() as lines:
            systemd.notify("WATCHDOG=1")
    assert [line["event"] for line in lines] == ["systemd.not_heard"]
