"""Deleting blobs that nobody needs, for `maskd prune`: those under tombstones that are due, and what superseded attempts left.

Enters: the queue and the blob store. Leaves: fewer blobs. Only keys of this database's own tasks are ever looked at, since a
bucket may be shared; a key is deleted only when, after it was seen, the database said that its attempt owns nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import anyio
import anyio.to_thread

from daemon.bulk import Stop, patiently
from storage.base import BlobStore, TaskStore, Tombstone, UnavailableError

KEYS_MAX = 1000
TOMBSTONES = 100
TASKS = 200
TOKEN = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


@dataclass(slots=True)
class Sweeper:
    """Both sweeps. At most `at_once` calls of the blob store at a time; raises UnavailableError where it fails."""

    store: TaskStore
    blobs: BlobStore
    at_once: int
    timeout_seconds: float
    deleted: int = 0

    async def tombstones(self, stop: Stop, advance: Callable[[int], None]) -> None:
        """Delete what is due, until nothing is or somebody stops it."""
        while not stop.wanted and (due := await patiently(partial(self.store.tombstones, TOMBSTONES))):
            await self._each(self._bury, due)
            await patiently(partial(self.store.bury_tombstones, [tombstone.id for tombstone in due]))
            advance(len(due))

    async def attempts(self, how: str, stop: Stop, advance: Callable[[int], None]) -> None:
        """Delete what attempts left that own nothing, of all tasks that ended so."""
        after: dict[str, Any] | None = None
        while not stop.wanted:
            page = await patiently(partial(self.store.ask, "ended", how=how, after=after, most=TASKS))
            if not page:
                return
            found: dict[tuple[str, str], list[str]] = {}
            await self._each(partial(self._look, found), page)
            owning = set(await self._owning(list(found)))
            stray = [key for (_, token), keys in found.items() if token not in owning for key in keys]
            for first in range(0, len(stray), KEYS_MAX):
                await self._delete(stray[first : first + KEYS_MAX])
            after = {"at": page[-1]["at"], "id": page[-1]["id"]}
            advance(len(page))

    async def _bury(self, tombstone: Tombstone) -> None:
        while keys := await self._in_time(self.blobs.list, tombstone.prefix, KEYS_MAX):
            await self._delete(keys)
            if len(keys) < KEYS_MAX:
                return

    async def _look(self, found: dict[tuple[str, str], list[str]], task: dict[str, Any]) -> None:
        """The keys under a task, by attempt; what does not look like one of ours is left out."""
        prefix = f"masks/{task['project']}/{task['id']}/"
        for key in await self._in_time(self.blobs.list, prefix, KEYS_MAX):
            token, _, name = key.removeprefix(prefix).partition("/")
            if TOKEN.fullmatch(token) and name:
                found.setdefault((task["id"], token), []).append(key)

    async def _owning(self, attempts: Sequence[tuple[str, str]]) -> list[str]:
        """Asked after their keys were seen: an attempt that owns nothing by now never will."""
        if not attempts:
            return []
        ids, tokens = [task_id for task_id, _ in attempts], [token for _, token in attempts]
        owning: list[str] = await patiently(partial(self.store.ask, "owning", ids=ids, tokens=tokens))
        return owning

    async def _delete(self, keys: Sequence[str]) -> None:
        await self._in_time(self.blobs.delete, keys)
        self.deleted += len(keys)

    async def _each(self, call: Callable[[Any], Any], items: Iterable[Any]) -> None:
        """`call` for all, some at once; the first error ends the others, and comes out by itself."""
        turns = anyio.Semaphore(self.at_once)
        errors: list[Exception] = []

        async def one(item: Any) -> None:
            async with turns:
                try:
                    if not errors:
                        await call(item)
                except Exception as error:
                    errors.append(error)

        async with anyio.create_task_group() as tasks:
            for item in items:
                tasks.start_soon(one, item)
        if errors:
            raise errors[0]

    async def _in_time(self, call: Callable[..., Any], *args: Any) -> Any:
        with anyio.move_on_after(self.timeout_seconds):
            return await anyio.to_thread.run_sync(call, *args, abandon_on_cancel=True)
        raise UnavailableError("the blob store did not answer in time")
