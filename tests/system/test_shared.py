"""Several daemons on one queue: they share its rows, none starves, and one that is killed in the middle costs nobody a row."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from support.daemons import DaemonProcess, launch, wait_ready, wait_until
from support.kinds_daemon import KINDS_VARIABLE, PROGRAM
from support.site import Site

DAEMONS = 4
ROWS, FIRST_ROWS = 200, 80
BATCH = 4
HELD = 2 * BATCH
"""What one daemon may hold here: one thread, one batch ahead."""
SETTINGS = {KINDS_VARIABLE: "hold", "MASKD_CPU_THREADS": "1", "MASKD_PREFETCH_BATCHES": "1", "MASKD_POLL_SECONDS": "1"}


def test_four_daemons_share_200_rows_and_each_is_done_once_though_one_is_killed_in_the_middle(site: Site, tmp_path: Path) -> None:
    gates = [tmp_path / "first", tmp_path / "then"]
    for gate in gates:
        gate.mkdir()
    first = site.queue.insert("hold", {"folder": str(gates[0])}, None, FIRST_ROWS)
    then = site.queue.insert("hold", {"folder": str(gates[1])}, None, ROWS - FIRST_ROWS)

    with together(site, tmp_path) as daemons:
        workers = [str(daemon.events("daemon.ready")[0]["worker"]) for daemon in daemons]
        wait_until("each daemon holds its share", lambda: held_by(site, first) == dict.fromkeys(workers, HELD))
        daemons[0].kill()
        (gates[0] / "go").touch()
        wait_until("each of the others has gone on", lambda: all(held_by(site, then)[worker] >= BATCH for worker in workers[1:]))
        (gates[1] / "go").touch()
        rows = site.queue.finished([*first, *then], 60)

    assert Counter(row["status"] for row in rows) == {"done": ROWS}
    assert site.queue.ends([*first, *then]) == {"done": ROWS}
    done = Counter(row["worker_id"] for row in rows)
    assert set(done) == set(workers[1:])
    assert min(done.values()) >= HELD + BATCH


@contextmanager
def together(site: Site, folder: Path) -> Iterator[list[DaemonProcess]]:
    """Daemons as on as many hosts, all of them ready."""
    daemons = [
        launch(site.settings(**SETTINGS, MASKD_STATE_DIR=str(folder / f"state-{n}")), folder, PROGRAM) for n in range(DAEMONS)
    ]
    try:
        for daemon in daemons:
            wait_ready(daemon)
        yield daemons
    finally:
        for daemon in daemons:
            daemon.kill()


def held_by(site: Site, ids: Sequence[str]) -> Counter[str]:
    """How many of these rows each worker holds."""
    return Counter(row["worker_id"] for row in site.queue.rows(ids) if row["status"] == "processing")
