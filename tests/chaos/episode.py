"""One episode: some daemons, some users, some faults; then quiet, and the checks."""

from __future__ import annotations

import random
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from chaos import checks
from chaos.checks import URLS, Violation
from chaos.faults import Faults
from chaos.fleet import TERMINATED, Fleet
from chaos.ground import Ground
from chaos.history import FINAL, READ, by_task, recovered, told
from chaos.load import Load
from chaos.report import Report
from support.daemons import wait_until
from support.s3_faults import fault_proxy

from storage.base import BlobStore
from storage.files import FileBlobs

SETTLED_SECONDS_MAX = 60.0
DEAD_SECONDS_MAX = 15.0
"""Lease of 2 s, twice after an outage, a sweep of 1 s, and a host that has better things to do."""
SWEPT_SECONDS_MAX = 30.0
TICK_SECONDS = 0.05
HELD_BY_THE_DEAD = """select count(*) from public.segmentation_results r where r.status = 'processing' and not exists
  (select from maskd.workers w where w.id = r.worker_id and w.beat_at > clock_timestamp() - w.lease)"""
ROWS = """select id::text, project_id::text as project, status, error, charged, claim_token::text as token,
  mask_image_url, masks_url, result_image_url from public.segmentation_results where id = any (%s)"""
CREDITS = "select id::text, credits from public.users_profile where id = any (%s::uuid[])"
USES = """select user_id::text as id, sum(credits_used)::int as credits from public.usage_logs
  where user_id = any (%s::uuid[]) group by 1"""
STORIES_MAX = 10
BURST_EVERY_SECONDS = 0.4
BURST_TASKS_MAX = 12


class Episode:
    """Everything of one episode. Used as a context: nothing of it is left afterwards."""

    def __init__(self, ground: Ground, report: Report, seed: int, count: int, store: str) -> None:
        self.ground = ground
        self.report = report
        self.dice = random.Random(seed)
        self.violations: list[Violation] = []
        self.slowest: tuple[float, str, str] = (0.0, "", "")
        self._stack = ExitStack()
        self._burst_at = 0.0
        self._never = threading.Event()
        folder = ground.folder / f"episode-{uuid.uuid4().hex[:8]}"
        folder.mkdir()
        s3 = self._stack.enter_context(fault_proxy(ground.s3.endpoint))
        self.blobs, settings = self._store(store, folder, s3.endpoint)
        self.load = Load(ground.tables, self.blobs)
        self.fleet = Fleet(ground.postgres.dsn, ("127.0.0.1", ground.postgres.port), folder, count, settings)
        self._stack.callback(self.fleet.end)
        self.faults = Faults(ground, self.fleet, None if store == "files" else s3, self.dice)

    def __enter__(self) -> Episode:
        try:
            for member in self.fleet.members:
                member.skew = self.dice.choice((0.0, -3600.0, 86_400.0, 7.5))
            self.fleet.start_all()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if not self.faults.postgres_is_up:
            self.ground.postgres.up()
        self._stack.close()

    def go_on(self, seconds: float) -> None:
        """Let that time pass: users send tasks, faults end and daemons start as they are due."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            self.faults.tick()
            self.fleet.tend()
            if time.monotonic() >= self._burst_at and self.faults.postgres_is_up:
                self._burst_at = time.monotonic() + BURST_EVERY_SECONDS
                self.load.burst(self.dice, self.dice.randint(1, BURST_TASKS_MAX), paid=self.dice.random() < 0.5)
            self._never.wait(TICK_SECONDS)

    def close(self) -> None:
        """End all faults, wait until it is quiet, and check."""
        self.faults.end_all()
        self.faults.settle_late()
        asked = self.load.asked
        self._wait("no row is held by a dead worker", DEAD_SECONDS_MAX, lambda: self.ground.tables.one(HELD_BY_THE_DEAD) == 0)
        self._wait(
            "every row has ended", SETTLED_SECONDS_MAX, lambda: all(row["status"] in FINAL for row in self._rows().values())
        )
        self._wait("what nobody needs is deleted", SWEPT_SECONDS_MAX, self._is_swept)
        codes = self.fleet.stop()
        history, rows = by_task(self.ground.tables.ask(READ, list(asked))), self._rows()
        self.violations += [
            *(Violation(text) for text in self.fleet.unexpected),
            *(Violation(f"a daemon that was told to stop ended with {code}") for code in codes if code not in TERMINATED),
            *checks.ended_once(asked, history),
            *checks.ended_rightly(asked, rows),
            *checks.blobs_of(asked, rows, self.blobs),
            *checks.orphans(rows, self.blobs.list("masks/", 1_000_000)),
            *checks.credits_add_up(self.load.users, rows, self._by_user(CREDITS), self._by_user(USES)),
        ]
        self._count(history, rows)

    def stories(self) -> str:
        """The violations, each with all that is known of its row."""
        parts = [f"  {each.task or ''} {each.sentence}\n{self.story(each.task)}" for each in self.violations[:STORIES_MAX]]
        more = len(self.violations) - STORIES_MAX
        return "\n".join(parts + [f"  … and {more} more"] * (more > 0))

    def story(self, task: str | None) -> str:
        """What was asked, every change of the row, and what the daemons logged of it."""
        if task is None:
            return ""
        entries = by_task(self.ground.tables.ask(READ, [task])).get(task, ())
        return "\n".join([f"    {self.load.asked.get(task)}", told(entries), *self.fleet.lines_about(task)])

    def _store(self, store: str, folder: Path, endpoint: str) -> tuple[BlobStore, dict[str, str]]:
        if store == "files":
            return FileBlobs(folder / "blobs"), {"MASKD_BLOB_DIR": str(folder / "blobs")}
        server = self.ground.s3
        bucket = server.make_bucket()
        return server.blobs(bucket), {
            "R2_ENDPOINT": endpoint,
            "R2_ACCESS_KEY_ID": server.access_key_id,
            "R2_SECRET_ACCESS_KEY": server.secret_access_key,
            "R2_BUCKET": bucket,
        }

    def _wait(self, what: str, seconds: float, condition: Callable[[], bool]) -> None:
        def so() -> bool:
            self.fleet.tend()
            return condition()

        try:
            wait_until(what, so, seconds, every=0.1)
        except AssertionError as error:
            self.violations.append(Violation(str(error)))

    def _rows(self) -> dict[str, Any]:
        return {row["id"]: row for row in self.ground.tables.ask(ROWS, list(self.load.asked))}

    def _is_swept(self) -> bool:
        """Tombstones are due at once now: nobody is at work that could still write under them."""
        self.ground.tables.ask("update maskd.tombstones set due_at = clock_timestamp() where due_at > clock_timestamp()")
        published = {row[column] for row in self._rows().values() for column in URLS if row[column]}
        return set(self.blobs.list("masks/", 1_000_000)) == published

    def _by_user(self, sql: str) -> dict[str, int]:
        found = self.ground.tables.ask(sql, [user.id for user in self.load.users])
        return {row["id"]: row["credits"] for row in found}

    def _count(self, history: Any, rows: dict[str, Any]) -> None:
        report = self.report
        report.ends += Counter(row["status"] for row in rows.values())
        report.taken_back += sum(len({entry.token for entry in entries if entry.token}) > 1 for entries in history.values())
        report.faults += Counter(name for name, _ in self.faults.over)
        for name, at in self.faults.over:
            if (found := recovered(history, at)) is not None:
                report.recoveries.append((name, found[0]))
                self.slowest = max(self.slowest, (*found, name))
        report.duplicates += _how_many(self.violations, "duplicate")
        report.lost += _how_many(self.violations, "lost")


def _how_many(violations: Sequence[Violation], word: str) -> int:
    return sum(violation.sentence.startswith(word) for violation in violations)
