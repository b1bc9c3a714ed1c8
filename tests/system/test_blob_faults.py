"""The blob store fails under load: nothing is lost, nothing done twice, no attempt spent; the gate shuts and opens again."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator

import pytest
from support.daemons import DaemonProcess, wait_until
from support.proxy import tcp_proxy
from support.s3 import S3Server, s3_server
from support.s3_faults import FaultProxy, fault_proxy
from support.site import PHOTO, PHOTO_BOX, Site

from storage.r2 import R2Blobs

GOOD = {"boxes": [PHOTO_BOX]}


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as running:
        yield running


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultProxy]:
    with fault_proxy(server.endpoint) as running:
        yield running


@pytest.fixture
def bucket(server: S3Server, site: Site) -> R2Blobs:
    """A bucket of the server with the photo in it, seen past the proxy."""
    blobs = server.blobs(server.make_bucket())
    blobs.put(site.photo, PHOTO.read_bytes(), "image/jpeg")
    return blobs


@pytest.mark.parametrize(("method", "status"), [("PUT", 503), (None, 403)], ids=["writes answer 503", "all is refused with 403"])
def test_a_blob_store_that_fails_for_a_while_costs_no_row_an_attempt(
    site: Site, server: S3Server, proxy: FaultProxy, bucket: R2Blobs, method: str | None, status: int
) -> None:
    with site.daemon("noop", "segment_visual", **settings(server, proxy, bucket)) as daemon:
        ids = site.queue.insert("segment_visual", GOOD, site.photo, 20) + site.queue.insert("noop", {"blob": True}, None, 30)
        wait_until("some are done", lambda: site.queue.states(ids)["done"] > 2, 30)
        proxy.answer(status, method=method)
        wait_until("the gate is shut", lambda: health(daemon) == ("degraded", False), 45)
        assert daemon.get("/ready")[0] == 503
        wait_until("what was held is given back", lambda: set(site.queue.states(ids)) <= {"pending", "done"}, 30)
        proxy.clear()
        rows = site.queue.finished(ids, 60)
        wait_until("the gate is open", lambda: health(daemon) == ("ok", True), 30)
        site.queue.ask("update maskd.tombstones set due_at = now()")  # else tried again a minute later
        wait_until("orphans are swept", lambda: set(bucket.list("masks/", 10_000)) == site.published(), 30)
        assert daemon.stop() == 0

    assert Counter((row["status"], row["attempts"], row["deaths"]) for row in rows) == {("done", 1, 0): len(ids)}
    assert site.queue.ends(ids) == {"done": len(ids)}
    assert daemon.events("task.failed") == []


def test_a_store_that_answers_probes_but_takes_no_writes_is_not_asked_in_a_hot_loop(
    site: Site, server: S3Server, proxy: FaultProxy, bucket: R2Blobs
) -> None:
    with site.daemon("noop", **settings(server, proxy, bucket)) as daemon:
        proxy.answer(403, method="PUT")
        (task,) = site.queue.insert("noop", {"blob": True})
        began = time.monotonic()
        wait_until("five writes are refused", lambda: proxy.requests("PUT") >= 5, 30)
        assert time.monotonic() - began > 2
        proxy.clear()
        assert site.queue.finished([task])[0]["attempts"] == 1
        assert daemon.stop() == 0


def test_a_database_that_is_back_is_noticed_while_the_blob_store_hangs(
    site: Site, server: S3Server, proxy: FaultProxy, bucket: R2Blobs
) -> None:
    held = site.queue.insert("hold", site.hold())  # one thread holds, the other meets the blob store
    with (
        tcp_proxy(site.database.host, site.database.port) as line,
        site.daemon("noop", "hold", dsn=site.database.through(line.port), **settings(server, proxy, bucket)) as daemon,
    ):
        wait_until("rows are in handlers", lambda: len(site.begun(held)) == 1, 30)
        proxy.answer(403)
        site.queue.insert("noop", {"blob": True})
        wait_until("the gate is shut", lambda: health(daemon) == ("degraded", False), 30)
        proxy.delay(600)  # from here on its probe hangs
        line.refuse()
        site.let_go()
        wait_until("the database is away too", lambda: '"database": false' in daemon.get("/health")[1], 30)
        line.clear()
        assert {row["status"] for row in site.queue.finished(held, 20)} == {"done"}
        assert health(daemon) == ("degraded", False)


def test_a_task_cancelled_while_its_blobs_are_written_leaves_none(
    site: Site, server: S3Server, proxy: FaultProxy, bucket: R2Blobs
) -> None:
    with site.daemon("noop", **settings(server, proxy, bucket)) as daemon:
        proxy.delay(60, times=1, method="PUT")
        (task,) = site.queue.insert("noop", {"blob": True})
        wait_until("the first blob is on its way", lambda: proxy.requests("PUT") == 1, 30)
        site.queue.ask("select maskd.cancel(array[%s::uuid])", task)
        wait_until("the daemon knows", lambda: bool(daemon.events("settle.lost")), 30)
        proxy.clear()  # the blob arrives after its claim was found to be lost
        wait_until("it is there no more", lambda: bucket.list("masks/", 10) == [] and proxy.requests("POST") > 0, 30)
        assert site.queue.row(task)["status"] == "canceled"
        assert proxy.requests("PUT") == 1
        assert daemon.stop() == 0
    assert bucket.list("masks/", 10) == []


def settings(server: S3Server, proxy: FaultProxy, bucket: R2Blobs) -> dict[str, str]:
    return {
        "R2_ENDPOINT": proxy.endpoint,
        "R2_ACCESS_KEY_ID": server.access_key_id,
        "R2_SECRET_ACCESS_KEY": server.secret_access_key,
        "R2_BUCKET": bucket._bucket,
    }


def health(daemon: DaemonProcess) -> tuple[str, bool]:
    body = json.loads(daemon.get("/health")[1])
    return body["status"], body["storage"]
