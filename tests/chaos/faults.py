"""The faults: each begins at once, and ends by itself or by `Faults.tick` when its time is over."""

from __future__ import annotations

import random
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from chaos.fleet import TERMINATED, UNLIMITED, Fleet, Member
from chaos.ground import Ground
from support.s3_faults import FaultProxy

Ending = Callable[[], None]
FILE_BYTES_MAX = 40
LATE = """select count(*) from maskd.settle((select coalesce(jsonb_agg(o), '[]') from (
  (select h.task as id, h.token, 'done' as fate, 'stale' as mask_image_url from public.history h
     join public.segmentation_results r on r.id = h.task
    where h.token is not null and not (r.status = 'processing' and r.claim_token = h.token) order by h.n desc limit 100)
  union all
  (select r.id, gen_random_uuid(), 'failed', null
     from public.segmentation_results r where r.status = 'processing' limit 20)) o))"""


@dataclass(slots=True, eq=False)
class Faults:
    """The faults of one episode. `over` has, of each that has ended, its name and when that was, in seconds since 1970."""

    ground: Ground
    fleet: Fleet
    s3: FaultProxy | None
    dice: random.Random
    over: list[tuple[str, float]] = field(default_factory=list)
    _open: list[tuple[float, str, Ending]] = field(default_factory=list)

    def tick(self) -> None:
        """End what has lasted long enough."""
        for due, name, ending in list(self._open):
            if due <= time.monotonic():
                self._open.remove((due, name, ending))
                ending()
                self._ended(name)

    def end_all(self) -> None:
        """End everything now."""
        self._open = [(0.0, name, ending) for _, name, ending in self._open]
        self.tick()
        for member in self.fleet.members:
            member.back_at = 0.0

    def kill(self, elsewhere: bool, away_seconds: float) -> None:
        """SIGKILL; the next life begins after a while, on this host (with what the last one left on disk) or on another."""
        member = self._some()
        if member is None:
            return
        member.expected = frozenset({-signal.SIGKILL})
        member.back_at = time.monotonic() + away_seconds
        member.send(signal.SIGKILL)
        member.state += elsewhere
        self._ended("SIGKILL")

    def terminate(self, away_seconds: float) -> None:
        """SIGTERM: it drains, and comes back."""
        member = self._some()
        if member is None:
            return
        member.expected = TERMINATED
        member.back_at = time.monotonic() + away_seconds
        member.send(signal.SIGTERM)
        self._ended("SIGTERM")

    def pause(self, seconds: float) -> None:
        """SIGSTOP, for longer than the lease or for less; then SIGCONT."""
        member = self._some()
        if member is None:
            return
        process = member.process
        member.paused = True
        member.send(signal.SIGSTOP)

        def go_on() -> None:
            if member.process is process:
                member.send(signal.SIGCONT)
                member.paused = False

        self._begin("SIGSTOP", seconds, go_on)

    def swallow(self, everybody: bool, seconds: float) -> None:
        """The line to the database becomes a black hole."""
        members = self.fleet.members if everybody else [self.dice.choice(self.fleet.members)]
        for member in members:
            member.proxy.swallow()
        self._begin("black hole", seconds, lambda: [member.proxy.clear() for member in members] and None)

    def refuse(self, everybody: bool, seconds: float) -> None:
        """The database refuses connections, and ends those there are."""
        members = self.fleet.members if everybody else [self.dice.choice(self.fleet.members)]
        for member in members:
            member.proxy.refuse()
        self._begin("refused", seconds, lambda: [member.proxy.clear() for member in members] and None)

    def lose_replies(self, call: str, times: int) -> None:
        """Calls are executed, and their replies lost, whoever makes them."""
        for member in self.fleet.members:
            member.proxy.lose_replies(call, times)
        self._ended("lost replies")

    def settle_late(self) -> None:
        """Settles of claims that are over arrive, as from a line that was stuck for long: nothing may change."""
        self.ground.tables.ask(LATE)
        self._ended("late settles")

    def terminate_backends(self) -> None:
        """pg_terminate_backend for every connection of a daemon."""
        sql = "select count(pg_terminate_backend(pid)) from pg_stat_activity where application_name like 'maskd%'"
        self.ground.tables.ask(sql)
        self._ended("backends terminated")

    def restart_postgres(self, immediate: bool, seconds: float) -> None:
        """The server goes, with or without having written its data, and comes back."""
        self.ground.postgres.down(immediate=immediate)
        self._begin("crash of Postgres" if immediate else "restart of Postgres", seconds, self.ground.postgres.up)

    @property
    def postgres_is_up(self) -> bool:
        return self.ground.postgres.pid is not None

    def break_s3(self, how: str, seconds: float) -> None:
        """The blob store, where it is one, answers 503 or 429, slowly, half, or not at all."""
        if self.s3 is None:
            return
        match how:
            case "503" | "429":
                self.s3.answer(int(how))
            case "slow":
                self.s3.delay(0.3)
            case "truncated":
                self.s3.truncate()
            case _:
                self.s3.reset()
        self._begin(f"S3 {how}", seconds, self.s3.clear)

    def fill_disk(self, seconds: float) -> None:
        """No file that a daemon writes may grow beyond a few bytes: blobs in a folder, journal and spool. Linux only."""
        member = self._some()
        if member is None or not hasattr(resource, "prlimit"):
            return
        process = member.process
        member.file_bytes_max(FILE_BYTES_MAX)

        def empty() -> None:
            if member.process is process:
                member.file_bytes_max(UNLIMITED)

        self._begin("disk full", seconds, empty)

    def _some(self) -> Member | None:
        awake = [member for member in self.fleet.members if member.running and not member.paused and not member.expected]
        return self.dice.choice(awake) if awake else None

    def _begin(self, name: str, seconds: float, ending: Ending) -> None:
        self._open.append((time.monotonic() + seconds, name, ending))

    def _ended(self, name: str) -> None:
        self.over.append((name, time.time()))
