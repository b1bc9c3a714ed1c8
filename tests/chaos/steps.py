"""The steps of a plan, as values: what users do, what breaks. One strategy makes them all, so that an episode is a mixture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from chaos.episode import Episode
from hypothesis import strategies as st

SHORT = st.integers(2, 12).map(lambda tenths: tenths / 10)
OUTAGE = st.integers(5, 45).map(lambda tenths: tenths / 10)
"""Shorter than the lease of two seconds, and longer than twice that."""
PAUSE = st.integers(10, 100).map(lambda tenths: tenths / 10)
"""Long enough for others to be at the same rows when the sleeper wakes."""


class Step(Protocol):
    """One thing that happens; then `after` seconds pass."""

    @property
    def after(self) -> float: ...

    def do(self, run: Episode) -> None: ...


@dataclass(frozen=True, slots=True)
class Users:
    """A burst beside the steady flow, and some change their mind."""

    tasks: int
    cancels: int
    paid: bool
    after: float

    def do(self, run: Episode) -> None:
        run.load.burst(run.dice, self.tasks, self.paid)
        run.load.cancel(run.dice, self.cancels)


@dataclass(frozen=True, slots=True)
class Process:
    """A daemon ends and comes back, or stands still for a while."""

    how: str
    seconds: float
    away: float
    after: float

    def do(self, run: Episode) -> None:
        match self.how:
            case "terminate":
                run.faults.terminate(self.away)
            case "pause":
                run.faults.pause(self.seconds)
            case _:
                run.faults.kill(self.how == "kill elsewhere", self.away)


@dataclass(frozen=True, slots=True)
class Line:
    """The way to the database fails, for one daemon or for all."""

    how: str
    call: str
    everybody: bool
    seconds: float
    after: float

    def do(self, run: Episode) -> None:
        match self.how:
            case "swallow":
                run.faults.swallow(self.everybody, self.seconds)
            case "refuse":
                run.faults.refuse(self.everybody, self.seconds)
            case "terminate":
                run.faults.terminate_backends()
            case "late":
                run.faults.settle_late()
            case _:
                run.faults.lose_replies(self.call, 3)


@dataclass(frozen=True, slots=True)
class Postgres:
    """The server goes and comes back."""

    immediate: bool
    seconds: float

    @property
    def after(self) -> float:
        return self.seconds + 0.1  # users cannot insert while it is away: the next step begins when it is back

    def do(self, run: Episode) -> None:
        run.faults.restart_postgres(self.immediate, self.seconds)


@dataclass(frozen=True, slots=True)
class Storage:
    """The blob store misbehaves, or the disk of a host is full."""

    how: str
    seconds: float
    after: float

    def do(self, run: Episode) -> None:
        if self.how == "disk":
            run.faults.fill_disk(self.seconds)
        else:
            run.faults.break_s3(self.how, self.seconds)


USERS = st.builds(Users, st.integers(10, 60), st.integers(0, 5), st.booleans(), SHORT)
PROCESSES = st.builds(Process, st.sampled_from(("kill", "kill elsewhere", "terminate", "pause", "pause")), PAUSE, SHORT, SHORT)
LINES = st.builds(
    Line,
    st.sampled_from(("swallow", "refuse", "terminate", "late", "lose", "lose")),
    st.sampled_from(("maskd.settle", "maskd.settle", "maskd.claim", "maskd.beat")),
    st.booleans(),
    OUTAGE,
    SHORT,
)
SERVERS = st.builds(Postgres, st.booleans(), SHORT)
STORES = st.builds(Storage, st.sampled_from(("503", "429", "slow", "truncated", "reset", "disk", "disk")), OUTAGE, SHORT)
STEPS: st.SearchStrategy[Step] = st.one_of(USERS, PROCESSES, PROCESSES, LINES, LINES, SERVERS, STORES, STORES)
