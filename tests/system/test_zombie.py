"""A worker that was stopped past its lease and comes back: its claims are stale, and what it writes changes nothing."""

from __future__ import annotations

import signal
from collections.abc import Mapping, Sequence
from typing import Any

from support.daemons import wait_until
from support.proxy import tcp_proxy
from support.site import Site

ROWS = 6


def test_a_worker_stopped_in_a_handler_past_its_lease_changes_nothing_when_it_wakes(site: Site) -> None:
    ids = site.queue.insert("hold", site.hold(blob=True, deaf=True), None, ROWS)
    with site.daemon("hold") as zombie:
        wait_until("the rows are in handlers", lambda: site.begun(ids) == set(ids))
        zombie.send(signal.SIGSTOP)
        with site.daemon("hold"):
            wait_until("the rows are rescued", lambda: not held_by(site, zombie.events("daemon.ready")[0]["worker"], ids))
            site.let_go()
            before = site.queue.finished(ids)
            zombie.send(signal.SIGCONT)
            wait_until("the stale claims are noticed", lambda: stale(zombie.lines()) == set(ids), 30)
            wait_until("the zombie's blobs are gone", lambda: site.stored() == site.published(), 30)
            (more,) = site.queue.insert("hold", site.hold(), None)
            site.queue.finished([more])
        assert zombie.stop() == 0

    assert site.queue.rows(ids) == before
    assert {row["status"] for row in before} == {"done"}
    assert site.queue.ends(ids) == {"done": ROWS}


def test_a_worker_stopped_before_its_settle_past_its_lease_changes_nothing_when_it_wakes(site: Site) -> None:
    with tcp_proxy(site.database.host, site.database.port) as proxy:
        dsn = site.database.through(proxy.port)
        with site.daemon("hold", dsn=dsn, MASKD_DATABASE_TIMEOUT_SECONDS="1", MASKD_POLL_SECONDS="1") as zombie:
            ids = site.queue.insert("hold", site.hold(blob=True), None, ROWS)
            wait_until("the rows are in handlers", lambda: site.begun(ids) == set(ids))
            proxy.swallow()
            site.let_go()
            wait_until("blobs are written that nobody heard of", lambda: len(site.stored()) == 2 * ROWS)
            zombie.send(signal.SIGSTOP)
            proxy.clear()
            with site.daemon("hold"):
                before = site.queue.finished(ids)
                assert site.stored() > site.published()
                zombie.send(signal.SIGCONT)
                wait_until("the stale claims are noticed", lambda: stale(zombie.lines()) == set(ids), 30)
                wait_until("the zombie's blobs are gone", lambda: site.stored() == site.published(), 30)
            (more,) = site.queue.insert("hold", site.hold(), None)
            assert site.queue.finished([more])[0]["status"] == "done"
            assert zombie.stop() == 0

    assert site.queue.rows(ids) == before
    assert site.queue.ends(ids) == {"done": ROWS}


def held_by(site: Site, worker: str, ids: Sequence[str]) -> bool:
    return any(row["worker_id"] == worker for row in site.queue.rows(ids))


def stale(lines: Sequence[Mapping[str, Any]]) -> set[str]:
    """Tasks whose claim a worker found to be lost."""
    return {line["task"] for line in lines if line["event"] in ("settle.lost", "lease.gone")}
