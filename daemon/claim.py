"""Claim: the only place that takes tasks, and only for free capacity; nothing waits here that another host could run.

Enters: the bell, free room in pools. Leaves: works that this process holds. A claim whose reply is lost is asked again under
its own token until it is answered.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

import structlog

from daemon import metrics
from daemon.gate import AWAY, Gate
from daemon.infer import Pool
from daemon.wake import Wake
from daemon.work import Held, Work
from storage.base import Claimed, TaskStore

log = structlog.get_logger(__name__)

REPEAT_SECONDS = 0.005
"""After a claim that got less than it asked for: rows that a competitor had locked may be free again. Later where others live:
what comes meanwhile is better done by those who are idle."""
Ask = Callable[[str, str, Sequence[str], int], Awaitable[Claimed]]


class Claimer:
    """Fills the pools of one worker for ever."""

    def __init__(self, store: TaskStore, worker: str, held: Held, wake: Wake, gate: Gate, claim_max: int) -> None:
        self._store = store
        self._worker = worker
        self._held = held
        self._wake = wake
        self._gate = gate
        self._claim_max = claim_max
        self._starved = False
        self._rounds = 0
        self._going = False
        self._yields = False
        self._next: dict[str, int] = {}
        self._announce: Callable[[], Awaitable[None]]
        held.on_leave = self._room_came_free

    def sign(self) -> tuple[int, int] | None:
        """For the watchdog: how often the loop went round, and its waiting; None while it does not run, or waits for all that is
        held to end."""
        return (self._rounds, self._wake.turns) if self._going else None

    async def run(
        self, pools: Sequence[Pool], admit: Callable[[Sequence[Work]], None], announce: Callable[[], Awaitable[None]]
    ) -> None:
        """Claim for ever; `admit` takes works over, `announce` tells the database that we live and which works have begun."""
        self._announce = announce
        self._going = True
        try:
            await self._go_round(pools, admit)
        finally:
            self._going = False

    async def _go_round(self, pools: Sequence[Pool], admit: Callable[[Sequence[Work]], None]) -> None:
        while True:
            self._rounds += 1
            if self._gate.failing:
                await self._gate.opened()
                await self._announce()  # before a claim: whoever was silent too long is not a worker any more
            self._wake.forget()
            self._starved = False
            found, more, suspects = False, False, False
            due: float | None = None
            for pool, place, kinds in turns(pools, self._next):
                room = min(pool.room(kinds, self._held.kinds(pool.name)), self._claim_max)
                if room == 0:
                    self._starved = True
                    continue
                claimed = await self._ask(self._store.claim, kinds, room)
                self._wake.found(claimed.tasks)
                found, suspects = found or bool(claimed.tasks), suspects or claimed.suspects
                due = min((each for each in (due, claimed.next_due_seconds) if each is not None), default=None)
                works = self._hold(pool, claimed)
                metrics.CLAIMS.labels("found" if works else "empty").inc()
                if works:
                    self._next[pool.name] = place + 1
                if len(works) == room:  # there is more: ask for it first, and admit these while the database is at it
                    more = True
                    asyncio.get_running_loop().call_soon(admit, works)
                else:
                    admit(works)
            if suspects:
                self._going = False
                await self._isolate(pools, admit)
                self._going = True
            elif not more:
                repeat = max(REPEAT_SECONDS, self._wake.turn())
                self._yields = found and repeat > REPEAT_SECONDS
                await self._wake.wait(repeat if found else due)
                self._yields = False

    async def _isolate(self, pools: Sequence[Pool], admit: Callable[[Sequence[Work]], None]) -> None:
        """Run suspects with nothing else in this process, so that a death is theirs alone; the database hears of it first."""
        await self._held.empty()
        for pool in pools:
            claimed = await self._ask(self._store.claim_suspects, pool.kinds, pool.capacity)
            works = self._hold(pool, claimed)
            if not works:
                continue
            log.warning("claim.isolated", tasks=len(works), kind=works[0].task.kind, deaths=works[0].task.deaths)
            for work in works:
                work.begun = True
            await self._announce()
            admit(works)
            await self._held.empty()

    async def _ask(self, call: Ask, kinds: Sequence[str], most: int) -> Claimed:
        token = str(uuid.uuid4())
        self._held.open_tokens.add(token)
        try:
            while True:
                try:
                    return await call(self._worker, token, kinds, most)
                except AWAY as error:
                    self._gate.shut("database", str(error))
                    await self._gate.opened_for("database")
                    await self._announce()
        finally:
            self._held.open_tokens.discard(token)

    def _hold(self, pool: Pool, claimed: Claimed) -> list[Work]:
        works = [Work(task, pool.handlers[task.kind], pool.name) for task in claimed.tasks]
        self._held.add(works)
        if works:
            self._wake.worked()
        for kind in {work.task.kind for work in works}:
            waited = [work.task.waited_seconds for work in works if work.task.kind == kind]
            metrics.CLAIMED.labels(kind).inc(len(waited))
            metrics.waited(kind, max(waited))
        return works

    def _room_came_free(self) -> None:
        has_nothing_left = len(self._held) == 0 and (self._yields or self._wake.yields)
        if self._starved or has_nothing_left:
            self._wake.ring("slot")


def turns(pools: Sequence[Pool], first: Mapping[str, int]) -> Iterator[tuple[Pool, int, Sequence[str]]]:
    """Per pool the kinds to claim together, those of one batch size, and the place of that group. It begins at `first`, which is
    behind the group that got something last, so that no kind keeps another from the room that comes free."""
    for pool in pools:
        count = len(pool.groups)
        begin = first.get(pool.name, 0)
        for place in range(begin, begin + count):
            yield pool, place % count, pool.groups[place % count]
