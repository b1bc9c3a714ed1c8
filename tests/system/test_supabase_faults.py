"""Daemons over HTTP when answers make no sense, keys are refused, and bytes vanish; and what an idle one still asks."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.daemons import ROOT, DaemonProcess, environment, launch, running, wait_ready, wait_until
from support.front import front
from support.kinds_daemon import KINDS_VARIABLE, PROGRAM
from support.postgrest import SERVICE_KEY, PostgrestServer
from support.realtime_server import RealtimeServer, supabase
from support.site import PHOTO, PHOTO_BOX, Site

SHUTDOWN_SECONDS_MAX = 20.0
Both = tuple[PostgrestServer, RealtimeServer]


@pytest.fixture
def both(site: Site) -> Iterator[Both]:
    with supabase(site.database.dsn) as servers:
        yield servers


def settings(site: Site, url: str, **more: str) -> dict[str, str]:
    """Settings of a daemon over HTTP that serves no-ops."""
    away = {"DATABASE_URL": "", "SUPABASE_URL": url, "SUPABASE_SERVICE_KEY": SERVICE_KEY, KINDS_VARIABLE: "noop hold"}
    return site.settings(**{**away, "MASKD_DATABASE_TIMEOUT_SECONDS": "2", **more})


def health(daemon: DaemonProcess) -> dict[str, object]:
    return dict(json.loads(daemon.get("/health")[1]))


def live(daemon: DaemonProcess) -> bool:
    return health(daemon)["wake"] == "push"


def metric(daemon: DaemonProcess, name: str) -> float:
    """The value of a series, by its name with labels."""
    found = [line for line in daemon.get("/metrics")[1].splitlines() if line.startswith(name + " ")]
    assert found, f"there is no {name}"
    return float(found[0].split()[-1])


def test_a_daemon_survives_nonsense_and_a_refused_key_and_goes_on_where_it_was(site: Site, both: Both) -> None:
    rpc, realtime = both
    with running(settings(site, rpc.url), site.folder, PROGRAM) as daemon:
        wait_until("push is proven", lambda: live(daemon))
        ids = site.queue.insert("noop", {"blob": True}, None, 20)
        for text in ('{"message": "not what was asked"}', "", "<html>"):
            rpc.faults.text = text
            ids += site.queue.insert("noop", {"blob": True}, None, 20)
            wait_until("the database is away", lambda: health(daemon)["database"] is False)
            rpc.faults.text = None
            wait_until("the database is back", lambda: health(daemon)["database"] is True)
        refusals = len(daemon.events("gate.refused"))
        rpc.faults.error = (401, {"message": "Invalid API key", "hint": "Double check it."})
        realtime.handshake_status = 403
        realtime.expire()
        ids += site.queue.insert("noop", {"blob": True}, None, 20)
        wait_until("the key is refused", lambda: len(daemon.events("gate.refused")) > refusals)
        probes = [line["timestamp"] for line in daemon.events("gate.refused")]
        wait_until("push is lost", lambda: not live(daemon))
        rpc.faults.error, realtime.handshake_status = None, None
        site.queue.finished(ids)
        wait_until("push is back", lambda: live(daemon))
        assert len(probes) == refusals + 1, "said once, not with every probe"
        assert metric(daemon, 'maskd_wake_ended_total{reason="channel",source="realtime"}') == 1
        assert metric(daemon, 'maskd_wake_ended_total{reason="refused",source="realtime"}') >= 1
        assert daemon.stop() == 0
    assert site.queue.ends(ids) == {"done": len(ids)}
    assert SERVICE_KEY not in daemon.log.read_text()


def test_functions_that_are_not_known_yet_are_waited_for(site: Site, both: Both) -> None:
    rpc, _ = both
    rpc.faults.unknown = {"maskd_versions", "maskd_tend"}
    daemon = launch(settings(site, rpc.url, MASKD_REST_SECONDS="0.2"), site.folder, PROGRAM)
    try:
        wait_until("it waits", lambda: bool(daemon.events("start.waiting")))
        assert daemon.process.poll() is None
        rpc.faults.unknown = {"maskd_tend"}
        wait_ready(daemon)
        wait_until("it would rest", lambda: bool(daemon.events("lease.no_rest")))
        beats = rpc.calls["maskd_beat"]
        wait_until("it beats instead", lambda: rpc.calls["maskd_beat"] > beats)
        rpc.faults.unknown = set()
        wait_until("it rests", lambda: rpc.calls.get("maskd_tend", 0) > 1)
        assert not daemon.events("gate.shut")
        assert daemon.stop() == 0
    finally:
        if daemon.process.poll() is None:
            daemon.kill()


def test_an_idle_daemon_makes_one_call_and_finds_what_nobody_announced_and_the_rows_of_the_dead(site: Site, both: Both) -> None:
    rpc, realtime = both
    quiet = {"MASKD_REST_SECONDS": "0.5", "MASKD_POLL_SECONDS": "1000", "MASKD_LEASE_SECONDS": "1.5"}
    with running(settings(site, rpc.url, **quiet, **{KINDS_VARIABLE: "noop"}), site.folder, PROGRAM) as idle:
        wait_until("push is proven", lambda: live(idle))
        looks = rpc.calls.get("maskd_tend", 0)
        wait_until("it rests", lambda: rpc.calls.get("maskd_tend", 0) > looks)
        before = dict(rpc.calls)
        wait_until("it has looked four times", lambda: rpc.calls["maskd_tend"] >= before["maskd_tend"] + 4)
        asked = {name: count - before.get(name, 0) for name, count in dict(rpc.calls).items() if count != before.get(name)}
        assert set(asked) == {"maskd_tend"}, "nothing else in four looks: three a minute by a lease of 30 seconds"
        realtime.silent = True
        site.queue.finished(site.queue.insert("noop"))
        beats = rpc.calls["maskd_beat"]
        assert beats > before["maskd_beat"], "with a claim it beats at once"
        ids = site.queue.insert("hold", site.hold(), None, 2)
        with running(settings(site, rpc.url, **quiet, **{KINDS_VARIABLE: "hold"}), site.folder, PROGRAM) as dying:
            wait_until("somebody has begun", lambda: len(site.begun(ids)) == 2)
            rescues = rpc.calls["maskd_rescue"]
            dying.kill()
        wait_until("the rows of the dead are back", lambda: site.queue.states(ids) == {"pending": 2})
        wait_until("it said so", lambda: [line["tasks"] for line in idle.events("lease.rescued")] == [2])
        assert rpc.calls["maskd_rescue"] == rescues, "by a look"
        assert idle.stop() == 0
    assert {row["attempts"] for row in site.queue.rows(ids)} == {1}


def test_a_shutdown_waits_for_no_server_that_swallows_everything(site: Site, both: Both) -> None:
    rpc, _ = both
    with front("127.0.0.1", int(rpc.url.rpartition(":")[2])) as before:
        with running(settings(site, before.url, MASKD_DRAIN_SECONDS="1"), site.folder, PROGRAM) as daemon:
            wait_until("push is proven", lambda: live(daemon))
            before.swallow()
            begun = time.monotonic()
            assert daemon.stop() == 0
            assert time.monotonic() - begun < SHUTDOWN_SECONDS_MAX
        before.clear()
        with running(settings(site, before.url, MASKD_DRAIN_SECONDS="1"), site.folder, PROGRAM) as daemon:
            before.swallow()
            rpc.faults.black_hole = True
            begun = time.monotonic()
            assert daemon.stop() == 0
            assert time.monotonic() - begun < SHUTDOWN_SECONDS_MAX * 2
            rpc.faults.black_hole = False


def command(site: Site, url: str, *words: str) -> subprocess.CompletedProcess[str]:
    values = environment("", site.folder, DATABASE_URL="", SUPABASE_URL=url, SUPABASE_SERVICE_KEY=SERVICE_KEY)
    done = subprocess.run(
        [sys.executable, "-m", "daemon", *words], env=values, cwd=ROOT, capture_output=True, text=True, timeout=90
    )
    assert SERVICE_KEY not in done.stdout + done.stderr
    return done


def test_an_operator_needs_no_database_url_but_to_migrate(site: Site, both: Both, tmp_path: Path) -> None:
    rpc, _ = both
    box = ",".join(map(str, PHOTO_BOX))
    with running(settings(site, rpc.url, **{KINDS_VARIABLE: "segment_visual"}, MASKD_VISUAL="classical"), site.folder, PROGRAM):
        sent = command(site, rpc.url, "submit", str(PHOTO), "--box", box, "--out", str(tmp_path / "out"))
        assert sent.returncode == 0, sent.stderr
    assert "done, 1 masks by classical" in sent.stdout
    assert len(list((tmp_path / "out").iterdir())) == 2
    site.queue.ask("update public.segmentation_results set status = 'error', error = '{\"code\": \"internal\"}'")
    assert command(site, rpc.url, "retry", "--error", "internal").stdout == "1 put back\n"
    migrated = command(site, rpc.url, "migrate")
    assert migrated.returncode == 78
    assert "DATABASE_URL" in migrated.stderr
    assert "Supabase CLI" in migrated.stderr
