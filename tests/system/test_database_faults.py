"""The database fails in every way it can: no row is stuck, done twice or charged an attempt, and nobody is called dead."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack

import pytest
from support.daemons import DaemonProcess, wait_until
from support.proxy import tcp_proxy
from support.site import PHOTO_BOX, Site

QUICK = {"MASKD_DATABASE_TIMEOUT_SECONDS": "1"}


@pytest.mark.parametrize("lost", ["maskd.claim", "maskd.settle", "maskd.beat", "maskd.rescue"])
def test_replies_lost_after_the_commit_leave_no_row_stuck_and_no_published_blob_deleted(site: Site, lost: str) -> None:
    with (
        tcp_proxy(site.database.host, site.database.port) as proxy,
        site.daemon("noop", dsn=site.database.through(proxy.port)) as daemon,
    ):
        proxy.lose_replies(lost, 3)
        ids = site.queue.insert("noop", {"blob": True}, None, 60)
        site.queue.finished(ids)
        wait_until("three replies are lost", lambda: proxy.cuts == 3 or bool(feed(site, ids)), 30)
        wait_until("all have ended", lambda: site.queue.states(ids) == {"done": len(ids)}, 30)
        wait_until("the daemon holds nothing", lambda: json.loads(daemon.get("/health")[1])["in_flight"] == 0)
        assert daemon.stop() == 0
    assert_done_once(site, ids)
    assert site.stored() == site.published()
    assert len(site.published()) == 2 * len(ids)


@pytest.mark.parametrize("fault", ["refuses", "swallows"])
def test_a_database_away_for_two_leases_makes_nobody_rescue_the_living(site: Site, fault: str) -> None:
    ids = site.queue.insert("hold", site.hold(), None, 16)
    with tcp_proxy(site.database.host, site.database.port) as proxy, ExitStack() as stack:
        dsn = site.database.through(proxy.port)
        daemons = [stack.enter_context(site.daemon("hold", dsn=dsn, MASKD_CPU_THREADS="1", **QUICK)) for _ in range(2)]
        wait_until("both hold rows", lambda: site.queue.states(ids) == {"processing": 16} and owners(site, ids) == 2)
        proxy.refuse() if fault == "refuses" else proxy.swallow()
        wait_until("two leases have passed", lambda: silent_seconds(site) > 4, 30)
        site.let_go()
        assert site.queue.states(ids) == {"processing": 16}
        proxy.clear()
        site.queue.finished(ids)
        wait_until("a lease and a rescue later", lambda: steady_seconds(site) > 4, 30)
        assert [daemon.stop() for daemon in daemons] == [0, 0]
    assert_done_once(site, ids)
    assert [daemon.events("lease.rescued") for daemon in daemons] == [[], []]


def test_postgres_restarted_under_load_loses_nothing_and_does_nothing_twice(private_site: Site) -> None:
    site = private_site
    with site.daemon(**QUICK) as daemon:
        ids = site.queue.insert("noop", {"blob": True}, None, 200) + site.queue.insert(
            "segment_visual", {"boxes": [PHOTO_BOX]}, site.photo, 20
        )
        for _ in range(2):
            ended = site.queue.states(ids)["done"]
            wait_until("some are done", lambda: site.queue.states(ids)["done"] > ended, 30)  # noqa: B023 - waited for at once
            site.database.embedded.restart(immediate=True)
            ids += site.queue.insert("noop", {"blob": True}, None, 100)
        site.queue.finished(ids)
        wait_until("push is back", lambda: wake_mode(daemon) == "push", 30)
        assert daemon.stop() == 0
    assert_done_once(site, ids)
    assert site.stored() == site.published()


def test_a_terminated_listen_connection_is_replaced_and_no_row_waits_for_it(site: Site) -> None:
    with site.daemon("noop", MASKD_POLL_SECONDS="1000", MASKD_POLL_UNPROVEN_SECONDS="1000") as daemon:
        ids: list[str] = []
        for _ in range(3):
            wait_until("push is proven", lambda: wake_mode(daemon) == "push", 30)
            assert (
                site.queue.one(
                    "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name = 'maskd listen'"
                )
                == 1
            )
            ids += site.queue.insert("noop")
            site.queue.finished(ids, 10)
        wait_until("push is proven", lambda: wake_mode(daemon) == "push", 30)
        ids += site.queue.insert("noop")
        site.queue.finished(ids, 10)
        assert len(daemon.events("wake.lost")) == 3
    assert_done_once(site, ids)


def assert_done_once(site: Site, ids: Sequence[str]) -> None:
    """Each row is done, ended exactly once, and paid with one attempt and no death."""
    assert site.queue.ends(ids) == {"done": len(ids)}
    assert Counter((row["status"], row["attempts"], row["deaths"]) for row in site.queue.rows(ids)) == {("done", 1, 0): len(ids)}


def feed(site: Site, ids: list[str]) -> list[str]:
    """A little more work, so that there are replies to lose."""
    ids += site.queue.insert("noop", {"blob": True}, None, 5)
    return []


def owners(site: Site, ids: Sequence[str]) -> int:
    return len({row["worker_id"] for row in site.queue.rows(ids)})


def silent_seconds(site: Site) -> float:
    """For how long even the last worker to beat has been silent."""
    return float(site.queue.one("select extract(epoch from min(clock_timestamp() - beat_at)) from maskd.workers"))


def steady_seconds(site: Site) -> float:
    """For how long every worker has been beating without a gap."""
    return float(site.queue.one("select extract(epoch from min(clock_timestamp() - steady_since)) from maskd.workers"))


def wake_mode(daemon: DaemonProcess) -> str:
    return str(json.loads(daemon.get("/health")[1])["wake"])
