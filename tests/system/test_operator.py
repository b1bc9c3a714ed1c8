"""Operators' commands beside daemons that work, on terminals too: nothing ends twice, no credit is lost, and no blob either."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import termios
import threading
import uuid
from collections import Counter
from pathlib import Path
from typing import Any

import psycopg
import pytest
from support.daemons import ROOT, wait_until
from support.postgrest import SERVICE_KEY
from support.realtime_server import supabase
from support.site import Site
from support.terminal import terminal
from typer.testing import CliRunner

from daemon.cli import app
from daemon.commands.submit import describe

CREDITS = 5000
LEAVE = "\x1b[?1049l"


def maskd(site: Site, *arguments: str, code: int = 0, **settings: str) -> Any:
    """What a command says: read as JSON where that is asked for, else as text. It asks nothing, since it has no terminal."""
    done = CliRunner().invoke(app, arguments, env=site.settings(None, **settings))
    assert done.exit_code == code, done.output + repr(done.exception)
    if "--json" in arguments:
        return json.loads(done.stdout)
    return done.stdout if code == 0 else done.output


def old(site: Site, ids: list[str], days: int = 100) -> None:
    site.queue.ask(
        "update public.segmentation_results set finished_at = now() - make_interval(days => %s) where id = any (%s)", days, ids
    )


def left(site: Site) -> set[str]:
    return {row["id"] for row in site.queue.ask("select id::text from public.segmentation_results")}


def test_a_cancel_of_everything_beside_a_daemon_ends_each_row_once_and_credits_add_up(site: Site) -> None:
    queue = site.queue
    queue.ask("insert into public.users_profile (id, credits) values (%s, %s)", queue.user, CREDITS)

    def paid(kind: str, count: int, params: Any) -> list[str]:
        rows = queue.ask(
            """insert into public.segmentation_results (project_id, kind, params, charged)
               select %s, %s, %s::jsonb, 1 from generate_series(1, %s) returning id::text""",
            queue.project,
            kind,
            json.dumps(params),
            count,
        )
        return [row["id"] for row in rows]

    held = paid("hold_alone", 60, site.hold())
    with site.daemon("hold_alone", "noop") as daemon:
        wait_until("some have begun", lambda: len(site.begun(held)) >= 2)
        ids = held + paid("noop", 400, {"blob": True})
        said = maskd(site, "cancel", "--all", "--json", "--batch", "40")
        rows = queue.finished(ids)
        wait_until("nobody runs any more", lambda: json.loads(daemon.get("/health")[1])["in_flight"] == 0)
        assert daemon.stop() == 0
    states = Counter(row["status"] for row in rows)
    assert states.keys() <= {"done", "canceled"}
    assert {row["status"] for row in rows if row["id"] in held} == {"canceled"}
    assert said["canceled"] == states["canceled"] >= len(held)
    assert not said["interrupted"]
    assert queue.ends(ids) == ({"done": states["done"]} if states["done"] else {})
    credits = queue.one("select credits from public.users_profile where id = %s", queue.user)
    charged = queue.one("select sum(charged) from public.segmentation_results")
    assert credits + charged == CREDITS
    assert charged == states["done"] + said["running"], "what had begun is not refunded"
    assert maskd(site, "cancel", "--all") == "nothing to cancel\n"


@pytest.mark.parametrize("way", ["database", "rpc"])
def test_a_paused_kind_waits_and_goes_on_at_once_when_it_is_resumed(site: Site, way: str) -> None:
    """By a wake-up, since the daemon polls only every quarter of an hour."""
    with supabase(site.database.dsn) as (rpc, _realtime):
        by = {"DATABASE_URL": "", "SUPABASE_URL": rpc.url, "SUPABASE_SERVICE_KEY": SERVICE_KEY} if way == "rpc" else {}
        with site.daemon("noop", "lose", MASKD_POLL_SECONDS="1000", **by) as daemon:
            wait_until("push is proven", lambda: json.loads(daemon.get("/health")[1])["wake"] == "push")
            assert maskd(site, "pause", "noop", "--json", **by) == {"changed": ["noop"], "paused": ["noop"]}
            paused = site.queue.insert("noop", {}, None, 3)
            site.queue.finished(site.queue.insert("lose", {}, None, 3))
            assert site.queue.states(paused) == {"pending": 3}
            assert "noop is paused" in maskd(site, "status", **by)
            wait_until("health says so", lambda: json.loads(daemon.get("/health")[1])["paused"] == ["noop"])
            assert maskd(site, "resume", "--json", **by) == {"changed": ["noop"], "paused": []}
            site.queue.finished(paused)
            assert daemon.stop() == 0
    assert site.queue.ends(paused) == {"done": 3}


def test_what_cannot_be_meant_is_a_usage_error_that_says_what_to_change(site: Site) -> None:
    assert "segment_visual" in maskd(site, "pause", "segment_visuel", code=2)
    assert "--all" in maskd(site, "cancel", code=2)
    assert "--all" in maskd(site, "cancel", "--all", "--kind", "noop", code=2)
    assert "30m" in maskd(site, "cancel", "--older-than", "soon", code=2)
    assert "UUID" in maskd(site, "cancel", "first", code=2)
    assert "--error" in maskd(site, "retry", code=2)
    assert "30m" in maskd(site, "prune", "--done-before", "1y", code=2)
    for command, option in (("prune", "--errors-before"), ("cancel", "--older-than")):
        assert "hundred years" in maskd(site, command, option, "9" * 400 + "d", code=2)
        assert "hundred years" in maskd(site, command, option, "99999d", code=2)
    assert "column id of projects" in " ".join(maskd(site, "retry", "--project", "mine", code=2).split())


def test_a_prune_beside_a_daemon_takes_old_tasks_with_their_blobs_and_leaves_what_a_live_one_names(site: Site) -> None:
    queue = site.queue
    with site.daemon("noop", "hold") as daemon:
        ids = queue.insert("noop", {"blob": True}, None, 40)
        queue.finished(ids)
        parent, gone, young = ids[0], ids[1:30], ids[30:]
        old(site, [parent, *gone])
        child = queue.one(
            """insert into public.segmentation_results (project_id, kind, params, after)
               values (%s, 'hold', %s, %s) returning id::text""",
            queue.project,
            json.dumps(site.hold()),
            parent,
        )
        wait_until("the child runs", lambda: site.begun([child]) == {child})
        stop, more = threading.Event(), list[str]()
        thread = threading.Thread(target=insert_on, args=(site, stop, more))
        thread.start()
        assert maskd(site, "prune", "--dry-run", "--json")["matched"] == 30
        said = maskd(site, "prune", "--json", "--batch", "7")
        stop.set()
        thread.join()
        assert (said["deleted"], said["kept"], said["interrupted"]) == (29, 1, False)
        queue.finished(more)
        assert left(site) == {parent, child, *young, *more}
        wait_until("blobs of deleted tasks are gone", lambda: site.stored() == site.published())
        site.let_go()
        queue.finished([child])
        assert maskd(site, "prune", "--json")["deleted"] == 1
        assert daemon.stop() == 0
    assert queue.ends([*young, *more, child]) == {"done": len(young) + len(more) + 1}


def insert_on(site: Site, stop: threading.Event, ids: list[str]) -> None:
    """A little work, again and again, for a thread of its own."""
    insert = """insert into public.segmentation_results (project_id, kind, params)
                select %s, 'noop', '{"blob": true}' from generate_series(1, 5) returning id::text"""
    with psycopg.connect(site.database.dsn, autocommit=True) as sql:
        while not stop.is_set() and len(ids) < 400:
            ids += [row[0] for row in sql.execute(insert, [site.queue.project])]


def test_an_interrupted_prune_says_how_far_it_came_and_goes_on_when_it_is_asked_again(site: Site) -> None:
    count = 2000
    site.queue.ask(
        """insert into public.segmentation_results (project_id, kind, status, finished_at)
           select %s, 'noop', 'done', now() - make_interval(days => 100) from generate_series(1, %s)""",
        site.queue.project,
        count,
    )
    command = [sys.executable, "-m", "daemon", "prune", "--json", "--batch", "2"]
    with subprocess.Popen(command, env=site.settings(), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        wait_until("some are gone", lambda: len(left(site)) < count)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    said = json.loads(out)
    assert (process.returncode, said["interrupted"]) == (1, True), err.decode()
    assert said["deleted"] == count - len(left(site)) > 0
    assert left(site), "it was too quick to be interrupted"
    again = maskd(site, "prune", "--json")
    assert (again["deleted"], again["interrupted"], left(site)) == (count - said["deleted"], False, set())


def test_while_the_blob_store_fails_tasks_are_pruned_and_their_blobs_are_deleted_the_next_time(site: Site) -> None:
    with site.daemon("noop") as daemon:
        ids = site.queue.insert("noop", {"blob": True}, None, 3)
        site.queue.finished(ids)
        daemon.stop()
    old(site, ids)
    nobody = {"MASKD_BLOB_DIR": "", "R2_ENDPOINT": "http://127.0.0.1:9", "R2_ACCESS_KEY_ID": "a", "R2_SECRET_ACCESS_KEY": "b"}
    said = maskd(site, "prune", code=1, **nobody)
    assert "stopped: 3 of 3 old tasks deleted" in said
    assert "Traceback" not in said
    assert len(site.stored()) == 6
    site.queue.ask("update maskd.tombstones set due_at = now()")  # they were put off by a minute
    assert maskd(site, "prune", "--json")["blobs"] == 6
    assert site.stored() == set()


def test_strays_are_found_under_tasks_of_this_database_alone(site: Site) -> None:
    queue = site.queue
    with site.daemon("noop") as daemon:
        (done,) = queue.insert("noop", {"blob": True})
        queue.finished([done])
        daemon.stop()
    stray, strange, nested = uuid.uuid4(), uuid.uuid4(), "by-hand.png"
    keys = {
        f"masks/{queue.project}/{done}/{stray}/mask.png": False,
        f"masks/{queue.project}/{done}/{nested}": True,
        f"masks/{queue.project}/{strange}/{stray}/mask.png": True,
        f"masks/{strange}/{done}/{stray}/mask.png": True,
        "masks/else.png": True,
    }
    for key in keys:
        site.blobs.put(key, b"x", "image/png")
    assert maskd(site, "prune", "--strays", "--json")["blobs"] == 1
    assert site.stored() == site.published() | {key for key, stays in keys.items() if stays}


def test_how_far_a_long_task_is_and_what_the_worker_does_is_seen_by_status_and_watch(site: Site) -> None:
    with site.daemon("hold_alone", "noop") as daemon:
        queue = site.queue
        queue.finished(queue.insert("noop", {"blob": True}, None, 20))
        (held,) = queue.insert("hold_alone", site.hold(share=0.4))
        found: dict[str, Any] = {}

        def told() -> bool:
            found.update(queue.one("select maskd.status()"))
            return any(run["share"] == 0.4 for worker in found["workers"] for run in worker["info"]["running"])

        wait_until("a beat tells the share", told)
        said = maskd(site, "watch")
        site.let_go()
        assert daemon.stop() == 0
    (worker,) = found["workers"]
    info = worker["info"]
    assert info["running"][0]["id"] == held
    assert info["load"]["cpu"]["busy"] == 1
    assert info["load"]["cpu"]["slots"] == 2
    assert {"infer", "write", "wait"} <= set(info["stages"])
    assert (info["gpus"], info["failing"]) == ({}, [])
    assert info["wake"] in ("push", "poll")
    assert len(json.dumps(info)) < 4000
    assert [rate["kind"] for rate in found["rates"]] == ["noop"]
    for words in ("hold_alone", "40%", worker["id"][:8], info["host"], "cpu 1/2", "stages"):
        assert words in said


@pytest.mark.parametrize(("columns", "key"), [(80, "q"), (140, "\x03")])
def test_watch_fits_the_terminal_follows_the_queue_and_leaves_it_clean(site: Site, columns: int, key: str) -> None:
    with terminal(site.settings(), "watch", "--every", "0.2", columns=columns) as screen:
        screen.expect("q quits")
        site.queue.insert("noop", {}, None, 7)
        screen.expect("7 waiting")
        screen.press(key)
        assert screen.wait() == 0
    text = screen.shown.decode()
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1, "the screen is given back"
    assert "Traceback" not in text


def test_a_watch_that_is_stopped_or_ended_from_outside_gives_the_terminal_back(site: Site) -> None:
    with terminal(site.settings(), "watch", "--every", "0.2") as screen:
        screen.expect("q quits")
        screen.process.send_signal(signal.SIGTSTP)
        screen.expect(LEAVE)
        wait_until("it sleeps", lambda: "T (stopped)" in Path(f"/proc/{screen.process.pid}/status").read_text())
        assert termios.tcgetattr(screen.fd)[3] & termios.ICANON, "the shell's lines are edited as ever"
        screen.shown = b""
        screen.process.send_signal(signal.SIGCONT)
        screen.expect("q quits")
        screen.process.send_signal(signal.SIGTERM)
        assert screen.wait() == 0
        assert termios.tcgetattr(screen.fd)[3] & termios.ICANON
    assert screen.shown.decode().count(LEAVE) == 1


def test_a_name_that_a_user_made_up_breaks_neither_status_nor_the_terminal(site: Site) -> None:
    site.queue.insert("[/red]\x1b[2J", {}, None, 1)
    said = maskd(site, "status")
    assert "[/red]" in said
    assert "\x1b" not in said
    (row,) = site.queue.ask("select id::text, status, error from public.segmentation_results")
    assert "\x1b" not in describe(row)


def test_on_a_terminal_many_are_cancelled_only_after_a_yes(site: Site) -> None:
    ids = site.queue.insert("noop", {}, None, 30)
    with terminal(site.settings(), "cancel", "--all") as screen:
        screen.expect("Cancel 30 tasks? [y/N]")
        screen.press("n\n")
        assert screen.wait() == 1
    assert site.queue.states(ids) == {"pending": 30}
    with terminal(site.settings(), "cancel", "--all") as screen:
        screen.expect("[y/N]")
        screen.press("y\n")
        assert screen.wait() == 0
        screen.expect("30 of 30 canceled")
    assert site.queue.states(ids) == {"canceled": 30}


def test_failed_tasks_are_put_back_by_error_and_kind_and_a_dry_run_only_counts(site: Site) -> None:
    queue = site.queue
    queue.insert("noop", {}, None, 12)
    queue.insert("lose", {}, None, 3)
    queue.ask(
        """update public.segmentation_results set status = 'error', finished_at = now(),
           error = '{"code": "timeout", "message": "x"}'"""
    )
    assert maskd(site, "retry", "--error", "timeout", "--dry-run") == "15 would be put back\n"
    assert maskd(site, "retry", "--error", "timeout", "--kind", "noop", "--limit", "5", "--json")["retried"] == 5
    assert maskd(site, "retry", "--kind", "noop") == "7 put back\n"
    assert maskd(site, "retry", "--error", "internal") == "0 put back: there is no such failed task\n"
    states = queue.ask("select kind, status, count(*) as n from public.segmentation_results group by 1, 2 order by 1")
    assert [(row["kind"], row["status"], row["n"]) for row in states] == [("lose", "error", 3), ("noop", "pending", 12)]
