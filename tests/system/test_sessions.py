"""Sessions of real daemons: images of projects, two daemons on one real Redis, and clicks while tasks are worked on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.daemons import DaemonProcess, running, wait_until
from support.redis_server import redis_server
from support.site import PHOTO, PHOTO_BOX, Site

NOBODY = "00000000-0000-4000-8000-000000000000"
CLASSICAL = {"MASKD_VISUAL": "classical", "MASKD_EVERYTHING": "classical"}

pytestmark = pytest.mark.system


def client_of(daemon: DaemonProcess) -> httpx.Client:
    return httpx.Client(base_url=f"http://127.0.0.1:{daemon.port}", timeout=30)


def code_of(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


def upload(client: httpx.Client) -> str:
    answer = client.post("/session", files={"file": PHOTO.read_bytes()})
    assert answer.status_code == 200, answer.text
    session_id: str = answer.json()["session_id"]
    return session_id


@pytest.fixture
def redis_url(tmp_path: Path) -> Iterator[str]:
    with redis_server(tmp_path) as url:
        yield url


def test_an_image_of_a_project_is_taken_and_that_of_another_is_not(site: Site) -> None:
    other_user, _ = site.queue.owner()
    with site.daemon(**CLASSICAL) as daemon, client_of(daemon) as client:

        def name(project: str, address: str) -> httpx.Response:
            return client.post("/session", json={"project_id": project, "image_url": address})

        created = name(site.queue.project, site.photo).json()
        assert (created["width"], created["height"], created["engine"]) == (451, 300, "classical")
        box = {"box": PHOTO_BOX}
        (mask,) = client.post(f"/session/{created['session_id']}/predict", json=box).json()["masks"]
        assert mask["area"] > 10_000
        assert code_of(name(site.queue.project, f"uploads/{site.queue.user}/nothing.jpg")) == (404, "image_missing")
        assert code_of(name(NOBODY, site.photo)) == (404, "image_missing")
        for address in (f"uploads/{other_user}/cat.jpg", "https://other.example/cat.jpg", f"uploads/{site.queue.user}/../x"):
            assert code_of(name(site.queue.project, address)) == (403, "image_url_forbidden")
        health = client.get("/health").json()
        assert health["cache"]["entries"] == 1
        assert health["sessions"]["store"] == "memory"
        text = client.get("/metrics").text
    assert "maskd_sessions_created_total 1.0" in text
    assert 'maskd_session_requests_total{route="POST /session",status="403"} 3.0' in text


def test_any_daemon_on_one_redis_answers_any_session(site: Site, redis_url: str) -> None:
    with ExitStack() as stack:
        settings = site.settings(MASKD_REDIS_URL=redis_url, **CLASSICAL)
        daemons = [stack.enter_context(running(settings, site.folder)) for _ in range(2)]
        one, two = (stack.enter_context(client_of(daemon)) for daemon in daemons)
        session_id = upload(one)
        answers = [client.post(f"/session/{session_id}/predict", json={"box": PHOTO_BOX}).json() for client in (one, two, two)]
        assert [answer["embedding_cached"] for answer in answers] == [True, False, True]
        assert answers[0]["masks"] == answers[1]["masks"]
        assert two.post(f"/session/{session_id}/everything").status_code == 202

        def state() -> Any:
            return one.get(f"/session/{session_id}").json()["everything"]["status"]

        wait_until("everything is found", lambda: state() == "done", 30)
        found = [client.get(f"/session/{session_id}/mask?x=200&y=150").json() for client in (one, two)]
        assert found[0] == found[1]
        assert found[0]["mask"]["area"] > 0
        assert one.delete(f"/session/{session_id}").status_code == 204
        assert code_of(two.get(f"/session/{session_id}")) == (404, "session_unknown")


def test_a_redis_that_goes_away_stops_sessions_and_nothing_else(site: Site, tmp_path: Path) -> None:
    with ExitStack() as stack:
        redis = ExitStack()
        url = redis.enter_context(redis_server(tmp_path))
        daemon = stack.enter_context(site.daemon("segment_visual", MASKD_REDIS_URL=url, **CLASSICAL))
        client = stack.enter_context(client_of(daemon))
        session_id = upload(client)
        redis.close()
        for answer in (client.get(f"/session/{session_id}"), client.post("/session", files={"file": PHOTO.read_bytes()})):
            assert (*code_of(answer), answer.headers["Retry-After"]) == (503, "unavailable", "1")
        (row,) = site.queue.finished(site.queue.insert("segment_visual", {"boxes": [PHOTO_BOX]}, site.photo))
        assert row["status"] == "done"
        assert client.get("/ready").status_code == 200
