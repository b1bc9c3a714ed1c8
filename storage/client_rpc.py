"""The inserting side over HTTP, for `maskd submit` and `maskd retry` where no Postgres port can be reached.

Enters: SUPABASE_URL and a service key. Leaves: ids and rows.
"""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any, Self

from storage.base import ConfigurationError
from storage.client import Owner, finished
from storage.rpc import Rpc

LOOK_SECONDS = 0.5


class RpcClient:
    """Client by RPC."""

    def __init__(self, rpc: Rpc) -> None:
        self._rpc = rpc

    @classmethod
    async def connect(cls, url: str, key: str, timeout_seconds: float = 10.0) -> Self:
        rpc = Rpc(url, key, timeout_seconds)
        await rpc.open()
        return cls(rpc)

    async def close(self) -> None:
        await self._rpc.close()

    async def owner(self, project_id: str | None) -> Owner:
        """The owner of a project; without one, that of the only project."""
        if project_id is not None:
            user = await self._rpc.call("owner_of", _user, project=project_id)
            if user is None:
                raise ConfigurationError(f"There is no project {project_id}")
            return Owner(user, project_id)
        owners = await self._rpc.call("projects", _owners, most=2)
        if len(owners) == 1:
            return owners[0]
        raise ConfigurationError(
            "There is more than one project: name one with --project"
            if owners
            else "There is no project yet: make one in the app"
        )

    async def insert(
        self,
        owner: Owner,
        kind: str,
        key: str | None,
        params: dict[str, Any],
        text: str | None = None,
        priority: int | None = None,
        after: str | None = None,
    ) -> str:
        """Insert one task under an id made here, so that a reply may be lost; the id."""
        task = {
            "id": str(uuid.uuid4()),
            "project_id": owner.project_id,
            "kind": kind,
            "source_image_url": key,
            "text_prompt": text,
            "params": params,
            "priority": priority,
            "after": after,
        }
        return await self._rpc.call("submit", str, task=task)

    async def rows(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """These tasks, in the order of `ids`."""
        by_id = await self._rpc.call("rows", _by_id, ids=list(ids))
        return [by_id[task_id] for task_id in ids if task_id in by_id]

    async def finished(self, ids: Sequence[str], timeout_seconds: float) -> list[dict[str, Any]]:
        """These tasks once all are final; TimeoutError when that takes too long."""
        return await finished(self.rows, ids, timeout_seconds, LOOK_SECONDS)


def _user(answer: Any) -> str | None:
    return None if answer is None else str(answer)


def _owners(answer: Any) -> list[Owner]:
    return [Owner(row["user_id"], row["project_id"]) for row in answer]


def _by_id(answer: Any) -> dict[str, dict[str, Any]]:
    return {row["id"]: row for row in answer}
