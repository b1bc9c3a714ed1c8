"""Everything mode of sessions: started, then asked how far it is, then which mask lies under a pixel. No HTTP in here.

Enters: sessions. Leaves: replies as JSON values. State and masks lie in the sessions' store, so that any daemon tells.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import structlog
from anyio.abc import TaskGroup

from daemon.lanes import Lane
from daemon.log import hashed
from daemon.session_masks import listed, packed, smallest_at
from daemon.sessions import Desk, Facts, SessionError, Sessions, busy, unknown
from handlers._rle import segmentation
from handlers.base import RejectedError, Request
from handlers.segment_everything import EverythingParams, options_of, parse
from models.base import EverythingOptions, Later, Mask, Role, Stop
from storage.base import ConfigurationError, SessionsFullError, UnavailableError

log = structlog.get_logger(__name__)

STATE, MASKS = "everything", "masks"
TELL_EVERY_SECONDS = 1.0
LEAVE_SECONDS = 2.0
"""What saying that a run is over may take when the daemon ends."""
RUNS_PER_WAITING = 4
"""Of as many asks as may wait one in so many may be for everything: the rest is for clicks."""


@dataclass(slots=True, eq=False)
class Run:
    """One that is under way here, or about to be: until `decided` it only keeps others of its session waiting. The engine's
    thread sets `progress`."""

    scope: anyio.CancelScope = field(default_factory=anyio.CancelScope)
    decided: anyio.Event = field(default_factory=anyio.Event)
    begun: bool = False
    progress: float = 0.0


class Everything:
    """All masks of sessions' images; one run per session at a time. `run` has to be under way."""

    def __init__(self, sessions: Sessions, clock: Callable[[], float] = time.time) -> None:
        self._sessions = sessions
        self._clock = clock
        self._runs: dict[str, Run] = {}
        self._tasks: TaskGroup | None = None

    async def run(self) -> None:
        """Hold what is started; until cancelled."""
        async with anyio.create_task_group() as tasks:
            self._tasks = tasks
            await anyio.sleep_forever()

    async def start(self, session_id: str, params: Mapping[str, Any]) -> dict[str, Any]:
        """Begin, unless it is under way or done in the same way already; how far it is."""
        desk = self._sessions.desk(Role.EVERYTHING)
        wish = parse(Request("segment_everything", None, None, params), self._sessions.limits.asks).params
        asked = wish.model_dump(exclude_none=True)
        while (ahead := self._runs.get(session_id)) is not None:
            await ahead.decided.wait()
            state = await self._state(session_id)
            if _stands(state, asked):
                return self._told(session_id, state)
        run = self._runs[session_id] = Run()
        try:
            state = await self._begin(session_id, run, desk, wish, asked)
        finally:
            run.decided.set()
            if not run.begun:
                self._leave(session_id, run)
        return self._told(session_id, state)

    async def _begin(
        self, session_id: str, run: Run, desk: Desk, wish: EverythingParams, asked: dict[str, Any]
    ) -> dict[str, Any]:
        """Start it in its place, which `run` holds, unless there is nothing to do; the state."""
        facts = await self._sessions.facts(session_id)
        state = await self._state(session_id)
        if _stands(state, asked):
            return state
        if sum(other.begun for other in self._runs.values()) >= max(self._sessions.limits.waiting_max // RUNS_PER_WAITING, 1):
            raise busy()
        assert self._tasks is not None, "everything is run by the daemon"
        run.begun = True
        state = {"status": "running", "asked": asked, "until": self._clock() + 2 * self._sessions.limits.everything_seconds}
        try:
            if not await self._write(session_id, STATE, json.dumps(state).encode()):
                raise unknown()
            self._tasks.start_soon(self._look, session_id, run, desk, facts, wish, state)
        except BaseException:
            run.begun = False
            raise
        return state

    async def status(self, session_id: str) -> dict[str, Any]:
        """none, running, done or failed, with the share that is done and the number of masks."""
        return self._told(session_id, await self._state(session_id))

    async def masks(self, session_id: str) -> dict[str, Any]:
        """What all masks are, largest first; SessionError before they are found."""
        return listed(await self._found(session_id))

    async def mask_at(self, session_id: str, x: float, y: float) -> dict[str, Any] | None:
        """The smallest mask at a pixel, None where there is none. RejectedError outside the image."""
        facts = await self._sessions.facts(session_id)
        if not (0 <= x < facts.width and 0 <= y < facts.height):
            raise RejectedError(
                "prompt_invalid", f"The point ({x:g}, {y:g}) lies outside the image of {facts.width} x {facts.height} pixels."
            )
        found = smallest_at(await self._found(session_id), x, y)
        if found is None:
            return None
        entry, mask = found
        told = {name: entry[name] for name in ("id", "score", "box", "area")}
        return told | {"rle": segmentation(mask, facts.size_wh)}

    def forget(self, session_id: str) -> None:
        """The session is over: so is what runs for it."""
        if session_id in self._runs:
            self._runs[session_id].scope.cancel()

    async def _look(
        self, session_id: str, run: Run, desk: Desk, facts: Facts, wish: EverythingParams, state: dict[str, Any]
    ) -> None:
        """Find all masks and store them; whatever goes wrong is the session's end state, and in the log. Raises nothing."""
        ended: dict[str, Any] = {"status": "failed", "asked": state["asked"]}
        try:
            with run.scope:
                async with anyio.create_task_group() as tasks:
                    tasks.start_soon(self._tell, session_id, run, state)
                    masks = await self._masks(session_id, desk, facts, wish, run)
                    tasks.cancel_scope.cancel()
                await self._write(session_id, MASKS, await self._sessions.in_thread(lambda: packed(masks, facts.size_wh)))
                ended |= {"status": "done", "count": len(masks)}
        except anyio.get_cancelled_exc_class():  # the daemon ends: whoever asks another one need not wait for `until`
            with anyio.move_on_after(LEAVE_SECONDS, shield=True):
                await self._write_or_log(session_id, ended)
            raise
        except Exception as error:
            log.error("session.everything_failed", session=hashed(session_id), exc_info=error)
        finally:
            self._leave(session_id, run)
        if not run.scope.cancelled_caught:
            await self._write_or_log(session_id, ended)

    def _leave(self, session_id: str, run: Run) -> None:
        """Its place is free, unless somebody else has taken it."""
        if self._runs.get(session_id) is run:
            del self._runs[session_id]

    def _here(self, session_id: str) -> Run | None:
        """What is under way here."""
        run = self._runs.get(session_id)
        return run if run is not None and run.begun else None

    async def _masks(self, session_id: str, desk: Desk, facts: Facts, wish: EverythingParams, run: Run) -> list[Mask]:
        """The masks of the image that are not empty."""

        def progress(done: float) -> None:
            run.progress = done

        options: EverythingOptions = replace(options_of(wish, desk.model), progress=progress)
        bring = await self._sessions.bringing(desk, session_id, facts)

        def look(stop: Stop) -> Later:
            embedding, _ = bring()
            stop()
            later: Later = desk.model.everything(embedding, options, stop)
            return later

        seconds = self._sessions.limits.everything_seconds
        later = await self._sessions.ask(desk, look, seconds=seconds, lane=Lane.SOON)
        return await self._sessions.in_thread(lambda: [mask for mask in later() if mask.bits.size])

    async def _tell(self, session_id: str, run: Run, state: dict[str, Any]) -> None:
        """Let other daemons know how far it is; the session lives on meanwhile. When it has ended, so does the run."""
        while True:
            await anyio.sleep(TELL_EVERY_SECONDS)
            if not await self._write_or_log(session_id, state | {"progress": round(run.progress, 3)}):
                run.scope.cancel()

    async def _state(self, session_id: str) -> dict[str, Any]:
        await self._sessions.facts(session_id)
        state = _read(await self._sessions.store.read(session_id, STATE))
        if state["status"] == "running" and self._here(session_id) is None and state["until"] < self._clock():
            return {"status": "failed", "asked": state["asked"]}  # the daemon that ran it is gone
        return state

    def _told(self, session_id: str, state: Mapping[str, Any]) -> dict[str, Any]:
        progress = 1.0 if state["status"] == "done" else 0.0
        if state["status"] == "running":
            run = self._here(session_id)
            progress = state.get("progress", 0.0) if run is None else round(run.progress, 3)
        return {"status": state["status"], "progress": progress, "count": state.get("count")}

    async def _found(self, session_id: str) -> bytes:
        state = await self._state(session_id)
        data = await self._sessions.store.read(session_id, MASKS) if state["status"] == "done" else None
        if data is None:
            raise SessionError(
                "not_generated", "All masks of this image are not there yet; POST everything, and wait until done."
            )
        return data

    async def _write(self, session_id: str, part: str, data: bytes) -> bool:
        try:
            return await self._sessions.store.write(session_id, part, data)
        except SessionsFullError as error:
            raise SessionError(
                "sessions_full", "There is no room for more masks; try again later.", int(error.retry_seconds) + 1
            ) from None

    async def _write_or_log(self, session_id: str, state: Mapping[str, Any]) -> bool:
        """Whether the session still lives, as far as that can be told."""
        try:
            return await self._sessions.store.write(session_id, STATE, json.dumps(state).encode())
        except (UnavailableError, ConfigurationError, SessionsFullError) as error:
            log.warning("session.state_unwritten", session=hashed(session_id), reason=str(error))
        except Exception:
            log.exception("session.state_unwritten", session=hashed(session_id))
        return True


def _stands(state: Mapping[str, Any], asked: Mapping[str, Any]) -> bool:
    """Whether there is nothing to start: it is under way, or done in the same way already."""
    return bool(state["status"] == "running" or (state["status"] == "done" and state["asked"] == asked))


def _read(data: bytes | None) -> dict[str, Any]:
    """A state as it was written; what somebody else has written there is none."""
    none: dict[str, Any] = {"status": "none"}
    if data is None:
        return none
    try:
        state = json.loads(data)
        known = state["status"] in ("done", "failed") or (state["status"] == "running" and state["until"] >= 0)
        return state if known and "asked" in state else none
    except (ValueError, TypeError, KeyError):
        return none
