"""A worker that ends while the database is away: what it had finished waits on disk, and its successor publishes it."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from support.daemons import launch, wait_ready, wait_until
from support.kinds_daemon import KINDS_VARIABLE, PROGRAM
from support.proxy import tcp_proxy
from support.site import Site

from daemon import spool

pytestmark = pytest.mark.system

ROWS = 12
PATIENT = {"MASKD_LEASE_SECONDS": "30", "MASKD_DATABASE_TIMEOUT_SECONDS": "2", "MASKD_DRAIN_SECONDS": "0"}


@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM"])
def test_what_was_finished_while_the_database_was_away_is_published_by_the_successor(site: Site, end: str) -> None:
    state = site.folder / "state"
    ids = site.queue.insert("hold", site.hold(blob=True), None, ROWS)
    with tcp_proxy(site.database.host, site.database.port) as proxy:
        dsn = site.database.through(proxy.port)
        settings = site.settings(dsn, **{KINDS_VARIABLE: "hold"}, **PATIENT)
        with site.daemon("hold", dsn=dsn, **PATIENT) as first:
            wait_until("all are claimed", lambda: site.queue.states(ids) == {"processing": ROWS}, 30)
            tokens = {row["claim_token"] for row in site.queue.rows(ids)}
            proxy.refuse() if end == "SIGTERM" else proxy.swallow()
            site.let_go()
            wait_until("all wait on disk", lambda: kept(state) == ROWS, 40)
            assert first.kill() is None if end == "SIGKILL" else first.stop() == 0
        assert kept(state) == ROWS
        heir = launch(settings, site.folder, PROGRAM)
        try:
            wait_until("it waits for the database", lambda: bool(heir.events("start.waiting")), 30)
            proxy.clear()
            wait_ready(heir)
            (published,) = heir.events("lease.published")
            rows = site.queue.rows(ids)
            assert heir.stop() == 0
        finally:
            heir.process.kill()
            heir.process.wait(10)

    assert published["tasks"] == ROWS
    assert Counter((row["status"], row["attempts"], row["deaths"]) for row in rows) == {("done", 1, 0): ROWS}
    assert {row["claim_token"] for row in rows} == tokens
    assert site.queue.ends(ids) == {"done": ROWS}
    assert site.stored() == site.published()
    assert list(state.glob("*.ends*")) == []


def kept(state: Path) -> int:
    """How many outcomes lie in the spool."""
    return sum(len(spool._decode(file) or ()) for file in state.glob("*.ends"))
