"""Sessions over real HTTP in this process: the real server, pool and store around any engine, without a queue beside them."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import anyio
import httpx

from daemon.infer import Pool
from daemon.journal import Journal
from daemon.server import Server
from daemon.session_everything import Everything
from daemon.session_routes import Access, SessionRoutes
from daemon.sessions import Desk, SessionLimits, Sessions
from handlers.base import Limits
from models.base import Models, Role
from models.cache import EmbeddingCache
from models.mock import Mock
from storage.base import SessionStore
from storage.memory import MemorySessions

TTL_SECONDS = 600.0
MB = 1_000_000


@dataclass(slots=True, eq=False)
class Counter:
    """The desk of a test: an HTTP client, and the parts behind it."""

    client: httpx.AsyncClient
    sessions: Sessions
    everything: Everything
    server: Server
    pool: Pool
    cache: EmbeddingCache

    async def upload(self, data: bytes, **headers: str) -> httpx.Response:
        return await self.client.post("/session", files={"file": ("photo", data)}, headers=headers)

    async def session(self, data: bytes) -> str:
        """The id of a new session."""
        answer = await self.upload(data)
        assert answer.status_code == 200, answer.text
        session_id: str = answer.json()["session_id"]
        return session_id

    async def click(self, session_id: str, **body: Any) -> httpx.Response:
        return await self.client.post(f"/session/{session_id}/predict", json=body)

    async def masks(self, session_id: str, **body: Any) -> list[dict[str, Any]]:
        answer = await self.click(session_id, **body)
        assert answer.status_code == 200, answer.text
        masks: list[dict[str, Any]] = answer.json()["masks"]
        return masks

    async def all_masks(self, session_id: str, **body: Any) -> dict[str, Any]:
        """The state of everything mode once it has ended."""
        answer = await self.client.post(f"/session/{session_id}/everything", json=body)
        assert answer.status_code == 202, answer.text
        with anyio.fail_after(60):
            while True:
                state: dict[str, Any] = (await self.client.get(f"/session/{session_id}")).json()["everything"]
                if state["status"] != "running":
                    return state


def a_store(clock: Callable[[], float] = time.monotonic, sessions_max: int = 100, bytes_max: int = 100 * MB) -> MemorySessions:
    return MemorySessions(TTL_SECONDS, sessions_max, bytes_max, clock)


def limits(**changes: Any) -> SessionLimits:
    values: dict[str, Any] = {
        "bytes_max": 20 * MB,
        "pixels_max": 50 * MB,
        "ttl_seconds": TTL_SECONDS,
        "timeout_seconds": 30.0,
        "everything_seconds": 60.0,
        "waiting_max": 8,
        "threads": 2,
        "asks": Limits(),
    }
    return SessionLimits(**values | changes)


def a_pool(models: Models, handlers: Any = None, **changes: Any) -> Pool:
    """The pool of one thread, with no kind of task unless `handlers` are given."""
    values: dict[str, Any] = {"threads": 1, "prefetch_batches": 1, "timeout_seconds": 60.0, "asks_max": 8}
    sizes = dict.fromkeys(handlers or {}, 1)
    return Pool("cpu", models, handlers or {}, sizes=sizes, journal=Journal(None, "w", "db"), **values | changes)


@asynccontextmanager
async def counter(
    engine: Any = None,
    store: SessionStore | None = None,
    access: Access | None = None,
    cache: EmbeddingCache | None = None,
    pool: Pool | None = None,
    started: bool = True,
    with_page: bool = False,
    **changes: Any,
) -> AsyncIterator[Counter]:
    """A desk on a port of its own; `changes` are those of its limits."""
    engine, cache = engine or Mock(), cache or EmbeddingCache(100 * MB)
    pool = pool or a_pool(Models(cache, visual=engine, everything=engine), asks_max=changes.get("waiting_max", 8))
    access = access or Access(None)
    sessions = Sessions(store or a_store(), limits(**changes))
    everything = Everything(sessions)
    server = Server(
        "127.0.0.1", 0, access, lambda: {"status": "ok"}, SessionRoutes(sessions, everything, access), with_page=with_page
    )
    if started:
        sessions.open_to({role: Desk(pool, role) for role in (Role.VISUAL, Role.EVERYTHING)}, None)
    await server.start()
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(everything.run)
        try:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.port}", timeout=30) as client:
                yield Counter(client, sessions, everything, server, pool, cache)
        finally:
            tasks.cancel_scope.cancel()
            with anyio.CancelScope(shield=True):
                await server.stop()
