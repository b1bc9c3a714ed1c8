"""Daemons with nothing but SUPABASE_URL and a service key: RPC and Realtime, beside one on a database URL, and under faults."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from support.daemons import ROOT, DaemonProcess, environment, launch, wait_until
from support.postgrest import SERVICE_KEY
from support.realtime_server import supabase
from support.site import Site

ROWS = 200


def by_rpc(url: str) -> dict[str, str]:
    """Settings instead of a database URL."""
    return {"DATABASE_URL": "", "SUPABASE_URL": url, "SUPABASE_SERVICE_KEY": SERVICE_KEY}


def health(daemon: DaemonProcess) -> dict[str, object]:
    return dict(json.loads(daemon.get("/health")[1]))


def test_two_daemons_one_by_asyncpg_and_one_by_rpc_share_200_rows_and_do_each_once(site: Site) -> None:
    with (
        supabase(site.database.dsn) as (rpc, _realtime),
        site.daemon("noop") as direct,
        site.daemon("noop", **by_rpc(rpc.url)) as remote,
    ):
        daemons = (direct, remote)
        for daemon in daemons:
            wait_until("push is proven", lambda: health(daemon)["wake"] == "push", 30)  # noqa: B023 - waited for at once
        ids: list[str] = []
        for _ in range(ROWS // 10):
            ids += site.queue.insert("noop", {"blob": True}, None, 10)
        workers = {str(health(daemon)["worker"]) for daemon in daemons}
        wait_until("both had a share", lambda: owners(site, ids) == workers or not ids.extend(more(site)), 30)
        rows = site.queue.finished(ids)
        said = remote.log.read_text()
        assert [daemon.stop() for daemon in daemons] == [0, 0]
    assert len(ids) >= ROWS
    assert site.queue.ends(ids) == {"done": len(ids)}
    assert Counter((row["status"], row["attempts"], row["deaths"]) for row in rows) == {("done", 1, 0): len(ids)}
    assert site.stored() == site.published()
    assert SERVICE_KEY not in said


def test_lost_replies_and_a_realtime_that_fails_leave_no_row_stuck_and_none_done_twice(site: Site) -> None:
    settings = {**by_rpc(""), "MASKD_POLL_SECONDS": "1000", "MASKD_DATABASE_TIMEOUT_SECONDS": "2", "MASKD_LOG_LEVEL": "debug"}
    with supabase(site.database.dsn) as (rpc, realtime), site.daemon("noop", **{**settings, "SUPABASE_URL": rpc.url}) as daemon:
        wait_until("push is proven", lambda: health(daemon)["wake"] == "push", 30)
        rpc.faults.lose_replies = {"maskd_claim": 3, "maskd_settle": 3, "maskd_beat": 2}
        ids = site.queue.insert("noop", {"blob": True}, None, 60)
        site.queue.finished(ids)
        wait_until("eight replies are lost", lambda: rpc.faults.lost == 8 or not ids.extend(more(site)), 30)
        realtime.expire()
        ids += more(site)
        site.queue.finished(ids)
        rpc.faults.status = 503
        wait_until("the database is away", lambda: health(daemon)["database"] is False, 30)
        ids += more(site)
        rpc.faults.status = None
        site.queue.finished(ids)
        wait_until("push is back", lambda: health(daemon)["wake"] == "push", 30)
        wait_until("the daemon holds nothing", lambda: health(daemon)["in_flight"] == 0)
        assert daemon.stop() == 0
    assert site.queue.ends(ids) == {"done": len(ids)}
    assert site.stored() == site.published()
    assert SERVICE_KEY not in daemon.log.read_text()


def test_a_realtime_that_tells_nothing_is_found_out_by_the_poll_and_no_row_waits_for_it_afterwards(site: Site) -> None:
    with supabase(site.database.dsn) as (rpc, realtime), site.daemon("noop", **by_rpc(rpc.url), MASKD_POLL_SECONDS="5") as daemon:
        wait_until("push is proven", lambda: health(daemon)["wake"] == "push", 30)
        realtime.silent = True
        ids: list[str] = []
        for _ in range(3):  # the first may be found by a poll that was due soon
            ids += site.queue.insert("noop", {}, None, 2)
            site.queue.finished(ids)
        wait_until("it is found deaf", lambda: any("deaf" in line["reason"] for line in daemon.events("wake.lost")), 10)
        assert health(daemon)["wake"] == "poll"
        told = daemon.get("/metrics")[1]
        assert 'maskd_wake_ended_total{reason="deaf",source="realtime"} 1.0' in told
        assert float(re.findall(r'^maskd_wake_missed_total\{source="realtime"\} (\S+)$', told, re.M)[0]) >= 2
        realtime.silent = False
        ids += more(site)
        wait_until(
            "a change that is told proves push", lambda: health(daemon)["wake"] == "push" or not ids.extend(more(site)), 30
        )
        site.queue.finished(ids)
        assert daemon.stop() == 0
    assert site.queue.ends(ids) == {"done": len(ids)}


def test_a_successor_on_the_same_host_reports_what_a_killed_daemon_had_begun(site: Site) -> None:
    with supabase(site.database.dsn) as (rpc, _realtime):
        ids = site.queue.insert("hold", site.hold(), None, 2)
        with site.daemon("hold", **by_rpc(rpc.url)) as killed:
            wait_until("both have begun", lambda: len(site.begun(ids)) == 2)
            killed.kill()
        site.let_go()
        with site.daemon("hold", **by_rpc(rpc.url)) as successor:
            rows = site.queue.finished(ids)
            assert len(successor.events("lease.buried")) == 1
            assert successor.stop() == 0
    assert {(row["status"], row["deaths"]) for row in rows} == {("done", 1)}


def test_a_wrong_key_ends_the_start_with_78_and_is_not_shown(site: Site, tmp_path: Path) -> None:
    wrong = "sb_secret_of-somebody-else"
    with supabase(site.database.dsn) as (rpc, _realtime):
        values = environment("", tmp_path, **{**by_rpc(rpc.url), "SUPABASE_SERVICE_KEY": wrong})
        daemon = launch(values, tmp_path)
        assert daemon.process.wait(30) == 78
    said = daemon.log.read_text()
    assert "SUPABASE_SERVICE_KEY" in said
    assert wrong not in said
    assert "Traceback" not in said


def test_status_needs_no_database_url(site: Site, tmp_path: Path) -> None:
    with supabase(site.database.dsn) as (rpc, _realtime):
        site.queue.insert("noop", {}, None, 3)
        values = environment("", tmp_path, **by_rpc(rpc.url))
        command = [sys.executable, "-m", "daemon", "status", "--json"]
        done = subprocess.run(command, env=values, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert [(row["kind"], row["count"]) for row in json.loads(done.stdout)["tasks"]] == [("noop", 3)]


def owners(site: Site, ids: Sequence[str]) -> set[str]:
    """Who had these rows."""
    return {str(row["worker_id"]) for row in site.queue.rows(ids)} - {"None"}


def more(site: Site) -> list[str]:
    """A little more work."""
    return site.queue.insert("noop", {"blob": True}, None, 5)
