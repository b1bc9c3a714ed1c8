"""Workers that are killed: their rows are done by others, once each, and only a row that kills is given up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.daemons import DaemonProcess, launch, wait_until
from support.kinds_daemon import KINDS_VARIABLE, PROGRAM
from support.proxy import tcp_proxy
from support.site import FINAL, PHOTO_BOX, Site

ROWS = 24


@pytest.mark.parametrize("successor", ["another host", "the same host"])
def test_rows_of_a_worker_killed_in_mid_batch_are_done_once_by_another_and_leave_no_orphan(
    site: Site, tmp_path: Path, successor: str
) -> None:
    state = tmp_path / ("state" if successor == "the same host" else "elsewhere")
    ids = site.queue.insert("segment_visual", {"boxes": [PHOTO_BOX]}, site.photo, ROWS)
    with tcp_proxy(site.database.host, site.database.port) as proxy:
        dsn = site.database.through(proxy.port)
        with site.daemon(dsn=dsn) as killed:
            wait_until("the first row is done", lambda: bool(site.published()))
            proxy.swallow()  # what is stored from now on, nobody hears of
            wait_until("blobs are written", lambda: len(site.stored() - site.published()) > 1)
            killed.kill()
        proxy.clear()
        assert site.queue.states(ids)["processing"] > 1

        with site.daemon(dsn=dsn, MASKD_STATE_DIR=str(state)) as other:
            rows = site.queue.finished(ids)
            wait_until("orphans are swept", lambda: site.stored() == site.published(), 30)
            assert bool(other.events("lease.buried")) == (successor == "the same host")
            assert bool(other.events("lease.rescued")) == (successor == "another host")

    assert Counter(row["status"] for row in rows) == {"done": ROWS}
    assert site.queue.ends(ids) == {"done": ROWS}
    assert len(site.stored()) == 2 * ROWS


def test_a_row_that_kills_its_worker_ends_as_poison_and_its_200_neighbours_are_done(site: Site, tmp_path: Path) -> None:
    before = site.queue.insert("kill", {}, site.photo, 100)
    (killer,) = site.queue.insert("kill", {"kill": True}, site.photo)
    healthy = before + site.queue.insert("kill", {}, site.photo, 100)

    deaths = serve_with_restarts(site, tmp_path, "kill segment_visual", [*healthy, killer])

    assert site.queue.row(killer)["error"]["code"] == "poison"
    assert site.queue.ends(healthy) == {"done": 200}
    assert site.queue.ends([killer]) == {"error": 1}
    assert 2 <= deaths <= 5


def test_two_rows_that_kill_in_one_kind_are_both_given_up_and_nothing_else(site: Site, tmp_path: Path) -> None:
    killers = site.queue.insert("kill", {"kill": True}, site.photo, 2)
    healthy = site.queue.insert("kill", {}, site.photo, 20)

    deaths = serve_with_restarts(site, tmp_path, "kill", [*healthy, *killers])

    assert [row["error"]["code"] for row in site.queue.rows(killers)] == ["poison", "poison"]
    assert site.queue.ends(healthy) == {"done": 20}
    assert deaths <= 8


def test_a_killed_worker_with_500_rows_in_flight_costs_a_few_batches(site: Site) -> None:
    ids = site.queue.insert("hold_many", site.hold(), None, 500)
    settings = {"MASKD_CPU_THREADS": "1", "MASKD_BATCH_MAX": "250", "MASKD_CLAIM_MAX": "500"}
    with site.daemon("hold_many", **settings) as killed:
        wait_until("all rows are in flight", lambda: site.queue.states(ids) == {"processing": 500} and len(site.begun(ids)) > 0)
        killed.kill()
    site.let_go()

    with site.daemon("hold_many", **settings) as heir:
        rows = site.queue.finished(ids)
        batches = int(metric(heir, "maskd_batch_tasks_count"))

    assert Counter(row["status"] for row in rows) == {"done": 500}
    assert site.queue.ends(ids) == {"done": 500}
    assert batches < 40
    assert max(row["attempts"] for row in rows) <= 2


def test_a_suspect_is_not_kept_waiting_by_a_backlog_that_never_ends(site: Site) -> None:
    ids = site.queue.insert("noop", {}, None, 4000)
    suspect = ids[-1]
    site.queue.ask(
        "update public.segmentation_results set deaths = 1, pending_at = pending_at - interval '11 seconds' where id = %s",
        suspect,
    )
    with site.daemon("noop", MASKD_CLAIM_MAX="20"):
        rows = site.queue.finished(ids)
    before = sum(row["finished_at"] < site.queue.row(suspect)["finished_at"] for row in rows)
    assert before < 1000


def serve_with_restarts(site: Site, folder: Path, kinds: str, ids: Sequence[str]) -> int:
    """Serve until these rows have ended, starting a daemon whenever one dies, as systemd does; how often one died."""
    settings = site.settings(**{KINDS_VARIABLE: kinds})
    daemons = [launch(settings, folder, PROGRAM)]

    def ended() -> bool:
        code = daemons[-1].process.poll()
        if code is not None:
            assert code == -9, f"only a kill ends a daemon here: {code}\n{daemons[-1].log.read_text()[-3000:]}"
            assert len(daemons) < 12, "too many deaths"
            daemons.append(launch(settings, folder, PROGRAM))
        return all(row["status"] in FINAL for row in site.queue.rows(ids))

    try:
        wait_until("every row ends", ended, 90)
    finally:
        daemons[-1].kill()
    return len(daemons) - 1


def metric(daemon: DaemonProcess, name: str) -> float:
    """The sum of a series over its labels."""
    _, text = daemon.get("/metrics")
    return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith((name + "{", name + " ")))
