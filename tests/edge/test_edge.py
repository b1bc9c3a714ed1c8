"""The Edge's example in real workerd: from a photo to its mask by the app's routes, and every way in which they refuse."""

from __future__ import annotations

import io
import json
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco
from support.daemons import DaemonProcess, environment, running, wait_until
from support.database import Database
from support.edge import FOLDER, NODE, WHY_NOT, Edge, edge
from support.postgrest import PostgrestServer
from support.realtime_server import supabase
from support.site import FINAL, PHOTO, PHOTO_BOX, Queue
from support.tokens import AUTH, JWT_SECRET, PUBLISHABLE_KEY, SERVICE_KEY, Signer, token, unsigned

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
S3 = {"R2_ACCESS_KEY_ID": "key-of-the-bucket", "R2_SECRET_ACCESS_KEY": "secret-of-the-bucket-0123456789"}
BYTES_MAX = 400_000
CREDITS = 20  # signup.sql
TEXT = {"kind": "segment_concept", "text_prompt": "cat"}  # the daemon below has no engine for it, so it waits
UNKNOWN = "00000000-0000-4000-8000-000000000000"


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who has signed up, with a project."""

    site: Site
    id: str
    project: str

    @property
    def token(self) -> str:
        return AUTH.token(self.id, self.site.rpc.url)

    @property
    def credits(self) -> int:
        return int(self.site.queue.one("select credits from public.users_profile where id = %s", self.id))

    def ask(self, method: str, path: str, **more: Any) -> Any:
        return self.site.edge.ask(method, path, self.token, **more)

    def segment(self, key: str = "", **body: Any) -> Any:
        headers = {"Idempotency-Key": key} if key else {}
        return self.ask("POST", "/segment", json={"project_id": self.project, **body}, headers=headers)

    def tasks(self) -> list[dict[str, Any]]:
        return self.site.queue.ask("select id::text, status from public.segmentation_results where project_id = %s", self.project)


@dataclass(frozen=True, slots=True)
class Site:
    """All of it: the database, Supabase before it, the Worker before that."""

    queue: Queue
    rpc: PostgrestServer
    edge: Edge

    def person(self) -> Person:
        return Person(self, *self.queue.owner())


@pytest.fixture(scope="module")
def site(module_database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    module_database.execute((FOLDER / "signup.sql").read_text())
    log = tmp_path_factory.mktemp("edge") / "log"
    secrets = (S3["R2_SECRET_ACCESS_KEY"], module_database.dsn)
    with (
        supabase(module_database.dsn) as (rpc, _realtime),
        edge(rpc.url, log, *secrets, SUPABASE_JWT_SECRET=JWT_SECRET.decode(), UPLOAD_BYTES_MAX=str(BYTES_MAX)) as worker,
    ):
        queue = Queue(module_database.dsn)
        yield Site(queue, rpc, worker)
        queue.close()


@pytest.fixture
def person(site: Site) -> Person:
    return site.person()


@contextmanager
def daemon(site: Site, folder: Path) -> Iterator[DaemonProcess]:
    """maskd beside the Worker: the same database by RPC, the same bucket by S3."""
    settings = {
        "DATABASE_URL": "",
        "SUPABASE_URL": site.rpc.url,
        "SUPABASE_SERVICE_KEY": SERVICE_KEY,
        "R2_ENDPOINT": site.edge.s3,
    }
    with running(environment("", folder, **settings, **S3), folder) as started:
        yield started


def test_a_photo_goes_in_and_its_mask_comes_out(site: Site, person: Person, tmp_path: Path) -> None:
    with daemon(site, tmp_path) as maskd:
        uploaded = person.ask("POST", "/upload", content=PHOTO.read_bytes(), headers={"Content-Type": "image/jpeg"}).data
        assert uploaded["image_url"].startswith(f"uploads/{person.id}/")
        sent = person.segment(kind="segment_visual", image_url=uploaded["image_url"], params={"boxes": [PHOTO_BOX]})
        task = f"/tasks/{sent.data['task_id']}"
        wait_until("the task ends", lambda: person.ask("GET", task).data["status"] in FINAL)
        assert maskd.stop() == 0
    found = person.ask("GET", f"/results/{sent.data['task_id']}").data
    mask = person.ask("GET", f"/results/{found['id']}/mask")
    masks = person.ask("GET", f"/results/{found['id']}/masks")

    assert (sent.status, sent.data["charged"], sent.data["credits"]) == (202, 1, CREDITS - 1)
    assert person.ask("GET", task).data["error"] is None
    assert found["metadata"]["engine"] == "classical"
    assert (mask.status, mask.headers["content-type"]) == (200, "image/png")
    assert mask.headers["cache-control"].startswith("private")
    (annotation,) = json.loads(masks.raw)["annotations"]
    with Image.open(io.BytesIO(mask.raw)) as image, Image.open(PHOTO) as photo:
        assert image.size == photo.size
        pixels = np.asarray(image)
    assert set(np.unique(pixels)) == {0, 1}
    assert pixels.sum() == coco.decode(annotation["segmentation"]).sum() == annotation["area"] > 10_000
    assert person.ask("GET", f"/results/{found['id']}/image").refusal == (404, "file_unknown")


def test_another_users_task_is_not_there(site: Site, person: Person) -> None:
    task = person.segment(**TEXT).data["task_id"]
    stranger = site.person()
    asked = [
        ("GET", f"/tasks/{task}"),
        ("GET", f"/results/{task}"),
        ("GET", f"/results/{task}/mask"),
        ("POST", f"/tasks/{task}/cancel"),
    ]
    assert {stranger.ask(*each).refusal for each in asked} == {(404, "task_unknown")}
    assert stranger.segment(project_id=person.project, **TEXT).refusal == (404, "project_unknown")
    assert stranger.segment(image_url=f"uploads/{person.id}/cat.jpg", **TEXT).refusal == (400, "image_url_forbidden")
    assert stranger.ask("GET", "/results").data["total"] == 0
    assert person.ask("GET", f"/results/{task}").refusal == (409, "not_done")
    assert person.ask("GET", "/tasks/not-a-uuid").refusal == (404, "task_unknown")


def forgeries(person: Person) -> Mapping[str, str]:
    """Tokens that are nobody's."""
    url = person.site.rpc.url
    public_key = json.dumps(AUTH.jwks()["keys"][0])
    return {
        "missing": "",
        "garbage": "abc.def.ghi",
        "not even three parts": "abc",
        "an API key": PUBLISHABLE_KEY,
        "a legacy API key": token(role="anon", iss=f"{url}/auth/v1", aud="authenticated", sub=person.id, exp=4e9),
        "expired": AUTH.token(person.id, url, lives_seconds=-60),
        "never expires": AUTH.token(person.id, url, exp=None),
        "of another project": AUTH.token(person.id, "https://elsewhere.supabase.co"),
        "for another audience": AUTH.token(person.id, url, aud="somebody"),
        "of the service": AUTH.token(person.id, url, role="service_role"),
        "signed by another key": Signer().token(person.id, url),
        "changed afterwards": swapped(AUTH.token(person.id, url), AUTH.token(UNKNOWN, url)),
        "unsigned": unsigned(AUTH.token(person.id, url)),
        "signed with the public key": token(
            secret=public_key.encode(), role="authenticated", iss=f"{url}/auth/v1", aud="authenticated", sub=person.id, exp=4e9
        ),
    }


def swapped(token: str, other: str) -> str:
    """A token with another's claims."""
    head, _, signature = token.split(".")
    return ".".join((head, other.split(".")[1], signature))


def test_whoever_has_no_good_token_is_refused_before_anything_is_asked(site: Site, person: Person) -> None:
    before = site.rpc.calls | {"jwks": 0}
    answers = {name: site.edge.ask("GET", "/results", forged).refusal for name, forged in forgeries(person).items()}
    assert {name: answer for name, answer in answers.items() if answer != (401, "unauthorized")} == {}
    assert site.rpc.calls | {"jwks": 0} == before


def test_a_legacy_token_is_good_where_the_project_has_its_secret(site: Site, person: Person) -> None:
    claims = {
        "iss": f"{site.rpc.url}/auth/v1",
        "aud": "authenticated",
        "role": "authenticated",
        "sub": person.id,
        "exp": 4_000_000_000,
    }
    assert site.edge.ask("GET", "/results", token(**claims)).data["items"] == []


def test_public_keys_are_fetched_once_for_many_requests(site: Site, person: Person) -> None:
    person.ask("GET", "/results")
    before = site.rpc.calls["jwks"]
    for _ in range(5):
        person.ask("GET", "/results")
    assert site.rpc.calls["jwks"] == before


def test_without_credits_nothing_is_made(site: Site, person: Person) -> None:
    site.queue.ask("update public.users_profile set credits = 1 where id = %s", person.id)
    assert person.segment(**TEXT).data["credits"] == 0
    assert person.segment(**TEXT).refusal == (402, "credits_missing")
    assert len(person.tasks()) == 1


def test_one_idempotency_key_makes_one_task_and_one_charge(person: Person) -> None:
    first, again = person.segment("once", **TEXT).data, person.segment("once", **TEXT).data
    assert (first["task_id"], first["repeated"]) == (again["task_id"], not again["repeated"])
    assert person.segment("once", **TEXT | {"text_prompt": "dog"}).refusal == (409, "idempotency_conflict")
    assert person.segment("x" * 201, **TEXT).refusal == (400, "params_invalid")
    assert (len(person.tasks()), person.credits) == (1, CREDITS - 1)


def test_a_lost_reply_is_asked_for_again_and_charged_once(site: Site, person: Person) -> None:
    site.rpc.faults.lose_replies = {"create_segmentation": 1}
    lost = site.rpc.faults.lost
    task = person.segment(**TEXT).data
    assert site.rpc.faults.lost == lost + 1
    assert task["repeated"] is True
    assert [row["id"] for row in person.tasks()] == [task["task_id"]]
    assert person.credits == CREDITS - 1


def test_too_many_waiting_tasks_are_told_to_come_later(site: Site, person: Person) -> None:
    site.queue.ask("update maskd.settings set value = '1' where key = 'active_rows_max'")
    try:
        person.segment(**TEXT)
        refused = person.segment(**TEXT)
    finally:
        site.queue.ask("update maskd.settings set value = '1000' where key = 'active_rows_max'")
    assert refused.refusal == (429, "too_many_tasks")
    assert refused.headers["retry-after"] == "5"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        ({"project_id": None, **TEXT}, "params_invalid"),
        ({"project_id": "mine", **TEXT}, "params_invalid"),
        ({"colour": "red", **TEXT}, "params_invalid"),
        ({"kind": 3}, "params_invalid"),
        ({"params": [1], **TEXT}, "params_invalid"),
        ({"after": "the last one", **TEXT}, "params_invalid"),
        ({"after": UNKNOWN, **TEXT}, "after_failed"),
        ({"kind": "segment_sound"}, "kind_unknown"),
        ({"image_url": "https://example.com/cat.jpg", **TEXT}, "image_url_forbidden"),
        ({"image_url": "masks/../uploads/cat.jpg", **TEXT}, "image_url_forbidden"),
        ({"text_prompt": "cat" * 1000}, "params_invalid"),
    ],
    ids=str,
)
def test_an_impossible_request_is_refused_with_a_code_and_costs_nothing(person: Person, body: dict[str, Any], code: str) -> None:
    assert person.segment(**body).refusal == (400, code)
    assert (person.tasks(), person.credits) == ([], CREDITS)


def test_bodies_that_are_no_json_or_too_long_are_refused(person: Person) -> None:
    assert person.ask("POST", "/segment", content=b"{").refusal == (400, "params_invalid")
    assert person.ask("POST", "/segment", content=b"[]").refusal == (400, "params_invalid")
    assert person.ask("POST", "/segment", content=b" " * 200_000).refusal == (413, "too_large")


def test_what_is_no_image_is_not_stored_whatever_it_is_called(person: Person) -> None:
    claims = {"Content-Type": "image/png"}
    assert person.ask("POST", "/upload", content=b"<svg onload=alert(1)>", headers=claims).refusal == (415, "image_invalid")
    assert person.ask("POST", "/upload", content=b"", headers=claims).refusal == (415, "image_invalid")
    assert person.ask("POST", "/upload", files={"photo": b"x"}).refusal == (400, "params_invalid")


def test_an_upload_is_called_by_what_it_is(person: Person) -> None:
    sent = person.ask("POST", "/upload", files={"file": ("../evil.exe", png(), "text/html")}).data
    assert sent == {"image_url": sent["image_url"], "content_type": "image/png", "bytes": len(png())}
    assert sent["image_url"].startswith(f"uploads/{person.id}/")
    assert sent["image_url"].endswith(".png")
    stored = httpx.get(f"{person.site.edge.s3}/s3-images/{sent['image_url']}")
    assert (stored.headers["content-type"], stored.content) == ("image/png", png())


def test_an_upload_that_is_too_large_is_refused_whether_its_length_is_told_or_not(person: Person) -> None:
    image = png() + b"\0" * BYTES_MAX
    assert person.ask("POST", "/upload", content=image).refusal == (413, "too_large")
    assert person.ask("POST", "/upload", content=iter([image, image])).refusal == (413, "too_large")


def test_an_upload_that_says_it_is_too_large_is_not_waited_for(person: Person) -> None:
    head = (
        f"POST /api/v1/upload HTTP/1.1\r\nHost: edge\r\nAuthorization: Bearer {person.token}\r\nContent-Length: 99999999\r\n\r\n"
    )
    with socket.create_connection((person.site.edge.host, person.site.edge.port), timeout=20) as line:
        line.sendall(head.encode())
        assert line.recv(1000).startswith(b"HTTP/1.1 413 ")


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "PNG")
    return file.getvalue()


def test_a_task_that_waits_can_be_cancelled_and_is_refunded_once(person: Person) -> None:
    task = person.segment(**TEXT).data["task_id"]
    first, again = (person.ask("POST", f"/tasks/{task}/cancel").data for _ in range(2))
    assert first == {"id": task, "status": "canceled", "canceled": True, "refunded": 1}
    assert again == {"id": task, "status": "canceled", "canceled": False, "refunded": 0}
    assert person.ask("GET", f"/tasks/{task}").data["status"] == "canceled"
    assert person.credits == CREDITS


def test_results_come_in_pages_newest_first(site: Site, person: Person) -> None:
    made = site.queue.ask(
        """insert into public.segmentation_results (project_id, kind, status, created_at)
           select %s, 'segment_visual', 'done', now() - n * interval '1 minute' from generate_series(1, 5) n
           returning id::text""",
        person.project,
    )
    person.segment(**TEXT)  # waits, so it is no result
    pages = [person.ask("GET", "/results", params={"limit": 2, "offset": offset}).data for offset in (0, 2, 4, 5, 9)]
    assert [[item["id"] for item in page["items"]] for page in pages] == [
        [row["id"] for row in made[start : start + 2]] for start in (0, 2, 4, 5, 9)
    ]
    assert [page["total"] for page in pages] == [5, 5, 5, 5, None]
    for wrong in ({"limit": 0}, {"limit": 101}, {"offset": -1}, {"limit": "many"}):
        assert person.ask("GET", "/results", params=wrong).refusal == (400, "params_invalid")


def test_while_the_database_is_away_the_app_is_told_to_come_back(site: Site, person: Person) -> None:
    site.rpc.faults.status = 503
    try:
        answers = [person.ask("GET", f"/tasks/{UNKNOWN}"), person.ask("GET", "/results"), person.segment(**TEXT)]
    finally:
        site.rpc.faults.status = None
    assert {answer.refusal for answer in answers} == {(503, "unavailable")}
    assert {answer.headers["retry-after"] for answer in answers} == {"5"}
    assert person.segment(**TEXT).status == 202


def test_a_read_that_fails_is_not_tried_again_while_the_app_waits(site: Site, person: Person) -> None:
    asked = site.rpc.calls.get("GET segmentation_results", 0)
    site.rpc.faults.lose_replies = {"GET segmentation_results": 1}
    assert person.ask("GET", "/results").refusal == (503, "unavailable")
    assert site.rpc.calls["GET segmentation_results"] == asked + 1


@pytest.mark.parametrize("answers", [False, True], ids=["nobody answers", "no key set is answered"])
def test_where_public_keys_cannot_be_fetched_nobody_is_called_a_forger(
    site: Site, person: Person, tmp_path: Path, answers: bool
) -> None:
    url = site.edge.s3 if answers else "http://127.0.0.1:9"
    with edge(url, tmp_path / "log") as alone:
        assert alone.ask("GET", "/results", AUTH.token(person.id, url)).refusal == (503, "unavailable")
        assert alone.ask("GET", "/results", "abc.def.ghi").refusal == (401, "unauthorized")


def test_other_routes_are_not_there_and_pages_of_any_origin_may_ask(site: Site, person: Person) -> None:
    assert person.ask("GET", "/users").refusal == (404, "route_unknown")
    asked = {
        "Origin": "https://app.example",
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization",
    }
    answer = site.edge.ask("OPTIONS", "/segment", headers=asked)
    assert (answer.status, answer.headers["access-control-allow-origin"]) == (204, "*")
    assert "authorization" in answer.headers["access-control-allow-headers"]


def test_the_example_passes_the_type_checker() -> None:
    done = subprocess.run(
        [NODE, "node_modules/typescript/bin/tsc"], cwd=FOLDER, capture_output=True, text=True, timeout=120, check=False
    )
    assert (done.returncode, done.stdout) == (0, "")
