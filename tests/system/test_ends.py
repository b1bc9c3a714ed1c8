"""How work ends before it is done: a graceful stop, a time limit, a cancel. What has not begun is given back with its attempt."""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Sequence

import pytest
from support.daemons import wait_until
from support.site import Site

ROWS = 16
GIVEN_BACK = ("pending", 0, 0)
RARELY = {"MASKD_POLL_SECONDS": "1000", "MASKD_POLL_UNPROVEN_SECONDS": "1000"}


def test_sigterm_finishes_what_runs_and_gives_back_the_rest_to_others_at_once(site: Site) -> None:
    ids = site.queue.insert("hold", site.hold(blob=True), None, ROWS)
    with site.daemon("hold") as daemon:
        begun = wait_begun(site, ids, 8)
        daemon.send(signal.SIGTERM)
        wait_until("the rest is given back", lambda: states(site, set(ids) - begun) == {GIVEN_BACK: ROWS - 8}, 20)
        assert states(site, begun) == {("processing", 1, 0): 8}
        site.let_go()
        assert daemon.process.wait(20) == 0
    assert states(site, begun) == {("done", 1, 0): 8}
    assert states(site, set(ids) - begun) == {GIVEN_BACK: ROWS - 8}
    assert site.queue.ends(ids) == {"done": 8}
    assert site.queue.ask("select from maskd.workers") == []

    with site.daemon("hold"):
        assert {row["status"] for row in site.queue.finished(ids)} == {"done"}
    assert site.queue.ends(ids) == {"done": ROWS}


def test_rows_that_a_stopping_worker_gives_back_are_announced_to_the_others(site: Site) -> None:
    with site.daemon("hold", MASKD_DRAIN_SECONDS="0") as leaving:
        ids = site.queue.insert("hold", site.hold(), None, ROWS)
        begun = wait_begun(site, ids, 8)
        wait_until("all are claimed", lambda: states(site, ids) == {("processing", 1, 0): ROWS}, 20)
        with site.daemon("hold", **RARELY) as staying:
            wait_until("the other waits for a push", lambda: bool(staying.events("wake.mode")), 20)
            assert leaving.stop() == 0
            site.let_go()
            rows = site.queue.finished(ids, 20)
    assert Counter((row["status"], row["attempts"]) for row in rows) == {("done", 1): ROWS}
    assert len(begun) == 8


def test_a_drain_limit_that_is_over_gives_back_what_still_runs(site: Site) -> None:
    ids = site.queue.insert("hold", site.hold(deaf=True), None, ROWS)
    with site.daemon("hold", MASKD_DRAIN_SECONDS="1") as daemon:
        wait_begun(site, ids, 8)
        assert daemon.stop(20) == 0
    assert states(site, ids) == {GIVEN_BACK: ROWS}


def test_a_second_sigterm_ends_at_once(site: Site) -> None:
    ids = site.queue.insert("hold", site.hold(deaf=True), None, ROWS)
    with site.daemon("hold", MASKD_DRAIN_SECONDS="1000") as daemon:
        wait_begun(site, ids, 8)
        daemon.send(signal.SIGTERM)
        wait_until("the drain began", lambda: bool(daemon.events("drain.begin")), 20)
        daemon.send(signal.SIGTERM)
        assert daemon.process.wait(10) == 1


def test_a_row_that_hangs_ends_as_timeout_while_the_other_thread_goes_on(site: Site) -> None:
    (hanging,) = site.queue.insert("hold_alone", site.hold(deaf=True))
    with site.daemon("hold_alone", "noop", MASKD_TIMEOUT_SECONDS="1") as daemon:
        others = site.queue.insert("noop", {"blob": True}, None, 20)
        assert {row["status"] for row in site.queue.finished(others)} == {"done"}
        row = site.queue.finished([hanging])[0]
        assert row["error"]["code"] == "timeout"
        assert daemon.events("infer.returned") == []
        site.let_go()
        wait_until("the thread comes back", lambda: bool(daemon.events("infer.returned")), 20)
        assert daemon.stop() == 0
    assert site.queue.ends([hanging]) == {"error": 1}


def test_a_hanging_row_takes_no_neighbour_of_its_batch_with_it(site: Site) -> None:
    healthy = site.queue.insert("hold", {"folder": str(site.folder / "open")}, None, 3)
    (site.folder / "open").mkdir()
    (site.folder / "open" / "go").touch()
    (hanging,) = site.queue.insert("hold", site.hold(deaf=True))
    with site.daemon("hold", MASKD_TIMEOUT_SECONDS="0.5", MASKD_CPU_THREADS="1") as daemon:
        wait_until("all threads are lost", lambda: daemon.process.poll() is not None, 30)
    with site.daemon("hold", MASKD_TIMEOUT_SECONDS="0.5", MASKD_CPU_THREADS="2"):
        rows = site.queue.finished([*healthy, hanging])
    assert [row["status"] for row in rows] == ["done", "done", "done", "error"]
    assert rows[-1]["error"]["code"] == "timeout"


def test_a_daemon_whose_threads_all_hang_gives_the_rest_back_and_exits_75(site: Site) -> None:
    hanging = site.queue.insert("hold_alone", site.hold(deaf=True), None, 2)
    with site.daemon("hold_alone", MASKD_TIMEOUT_SECONDS="1") as daemon:
        wait_begun(site, hanging, 2)
        waiting = site.queue.insert("hold_alone", site.hold(), None, 2)
        wait_until("prefetched", lambda: states(site, waiting) == {("processing", 1, 0): 2}, 20)
        assert daemon.process.wait(30) == 75
    assert [row["error"]["code"] for row in site.queue.rows(hanging)] == ["timeout", "timeout"]
    assert states(site, waiting) == {GIVEN_BACK: 2}
    assert site.queue.ask("select from maskd.workers") == []


@pytest.mark.parametrize("begun", [True, False], ids=["running", "claimed but not begun"])
def test_a_cancelled_task_stops_and_leaves_nothing(site: Site, begun: bool) -> None:
    ids = site.queue.insert("hold_alone", site.hold(blob=True), None, 2)
    with site.daemon("hold_alone", MASKD_CPU_THREADS="1") as daemon:
        wait_until("both are claimed", lambda: states(site, ids) == {("processing", 1, 0): 2}, 20)
        running = next(iter(wait_begun(site, ids, 1)))
        (task,) = (task_id for task_id in ids if (task_id == running) == begun)
        (other,) = (task_id for task_id in ids if task_id != task)
        site.queue.ask("select maskd.cancel(array[%s::uuid])", task)
        wait_until("the worker knows", lambda: [line["task"] for line in daemon.events("lease.gone")] == [task], 20)
        if begun:
            wait_until("the handler stopped", lambda: (site.folder / f"stopped-{task}").exists(), 20)
        site.let_go()
        assert site.queue.finished([other])[0]["status"] == "done"
        assert daemon.stop() == 0
    assert site.queue.row(task)["status"] == "canceled"
    assert (site.folder / f"begun-{task}").exists() == begun
    assert site.stored() == site.published()
    assert {key.split("/")[2] for key in site.stored()} == {other}


def test_a_task_to_be_tried_again_is_taken_when_it_is_due_without_any_poll(site: Site) -> None:
    with site.daemon("segment_visual", MASKD_RETRY_SECONDS="0.5", **RARELY) as daemon:
        wait_until("push is proven", lambda: bool(daemon.events("wake.mode")), 20)
        key = f"uploads/{site.queue.user}/nowhere.jpg"
        (task,) = site.queue.insert("segment_visual", {"boxes": [[1, 1, 9, 9]]}, key)
        (row,) = site.queue.finished([task], 20)
    assert (row["error"]["code"], row["attempts"]) == ("image_missing", 2)


def wait_begun(site: Site, ids: Sequence[str], count: int) -> set[str]:
    """Which rows are in handlers, once they are so many."""
    wait_until(f"{count} rows are in handlers", lambda: len(site.begun(ids)) == count, 30)
    return site.begun(ids)


def states(site: Site, ids: Sequence[str] | set[str]) -> Counter[tuple[str, int, int]]:
    """Status, attempts and deaths of these rows, counted."""
    return Counter((row["status"], row["attempts"], row["deaths"]) for row in site.queue.rows(list(ids)))
