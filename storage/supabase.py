"""TaskStore over HTTP: each method calls one function public.maskd_… by PostgREST, and reads its one jsonb.

Enters: SUPABASE_URL and a service key. Leaves: values of `storage.base`. Every function may be replayed: a reply may be lost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from storage.base import Beat, Claimed, Outcome, SchemaError, Task, Tended, Tombstone, Verdict
from storage.rpc import Rpc
from storage.schema import migration_files


class SupabaseStore:
    """TaskStore by RPC."""

    def __init__(self, url: str, key: str, *, timeout_seconds: float = 10.0) -> None:
        self._rpc = Rpc(url, key, timeout_seconds)

    async def open(self) -> None:
        try:
            await self._rpc.open()
            await self._check_version()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        await self._rpc.close()

    async def claim(self, worker: str, token: str, kinds: Sequence[str], most: int) -> Claimed:
        return await self._rpc.call("claim", _claimed(token), worker=worker, token=token, kinds=list(kinds), most=most)

    async def claim_suspects(self, worker: str, token: str, kinds: Sequence[str], most: int) -> Claimed:
        return await self._rpc.call("claim_suspects", _claimed(token), worker=worker, token=token, kinds=list(kinds), most=most)

    async def settle(self, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Verdict]:
        return await self._rpc.call("settle", _verdicts, outcomes=[_outcome(outcome) for outcome in outcomes])

    async def beat(self, beat: Beat) -> list[tuple[str, str]]:
        return await self._rpc.call(
            "beat",
            _gone,
            worker=beat.worker,
            lease_seconds=beat.lease_seconds,
            info=dict(beat.info),
            kinds=list(beat.kinds),
            held_ids=[task_id for task_id, _ in beat.held],
            held_tokens=[token for _, token in beat.held],
            begun_ids=list(beat.begun_ids),
            open_tokens=list(beat.open_tokens),
        )

    async def tend(
        self, worker: str, lease_seconds: float, unserved_seconds: float, most: int, ahead_seconds: float
    ) -> Tended | None:
        return await self._rpc.call(
            "tend",
            _tended,
            worker=worker,
            lease_seconds=lease_seconds,
            unserved_seconds=unserved_seconds,
            most=most,
            ahead_seconds=ahead_seconds,
        )

    async def rescue(self, worker: str, unserved_seconds: float) -> int:
        return await self._rpc.call("rescue", int, worker=worker, unserved_seconds=unserved_seconds)

    async def bury(self, worker: str, begun_ids: Sequence[str]) -> int:
        return await self._rpc.call("bury", int, worker=worker, begun_ids=list(begun_ids))

    async def leave(self, worker: str) -> None:
        await self._rpc.call("leave", _nothing, worker=worker)

    async def tombstones(self, most: int) -> list[Tombstone]:
        return await self._rpc.call("due_tombstones", _tombstones, most=most)

    async def bury_tombstones(self, ids: Sequence[int]) -> None:
        await self._rpc.call("bury_tombstones", _nothing, ids=list(ids))

    async def masks_of(self, task_id: str, project_id: str) -> str | None:
        return await self._rpc.call("masks_of", _text, task=task_id, project=project_id)

    async def owner_of(self, project_id: str) -> str | None:
        return await self._rpc.call("owner_of", _text, project=project_id)

    async def key_templates(self) -> list[str]:
        return await self._rpc.call("key_templates", _texts)

    async def status(self) -> dict[str, Any]:
        return await self._rpc.call("status", _status)

    async def checkup(self) -> dict[str, Any]:
        return await self._rpc.call("checkup", dict)

    async def ask(self, function: str, **arguments: Any) -> Any:
        return await self._rpc.call(function, _anything, **arguments)

    async def probe(self) -> None:
        await self._rpc.call("version", _text)

    async def _check_version(self) -> None:
        applied = set(await self._rpc.call("versions", _texts))
        missing = [version for file in migration_files() if (version := file.name.partition("_")[0]) not in applied]
        if missing:
            raise SchemaError(f"The database schema lacks {len(missing)} migration(s), first {missing[0]}; run: maskd migrate")


def _listed(answer: Any) -> list[Any]:
    if not isinstance(answer, list):
        raise TypeError("not a list")
    return answer


def _nothing(answer: Any) -> None:
    if answer is not True:
        raise TypeError("not true")


def _anything(answer: Any) -> Any:
    return answer


def _text(answer: Any) -> str | None:
    if answer is not None and not isinstance(answer, str):
        raise TypeError("not a text")
    return answer


def _texts(answer: Any) -> list[str]:
    return [str(each) for each in _listed(answer)]


def _gone(answer: Any) -> list[tuple[str, str]]:
    return [(row["id"], row["token"]) for row in _listed(answer)]


def _verdicts(answer: Any) -> dict[tuple[str, str], Verdict]:
    return {(row["id"], row["token"]): Verdict(row["verdict"]) for row in _listed(answer)}


def _tombstones(answer: Any) -> list[Tombstone]:
    return [Tombstone(int(row["id"]), str(row["prefix"])) for row in _listed(answer)]


def _tended(answer: Any) -> Tended | None:
    if answer is None:
        return None
    silent = answer["silent_seconds"]
    return Tended(
        int(answer["rescued"]),
        tuple(_tombstones(answer["tombstones"])),
        bool(answer["work"]),
        None if silent is None else float(silent),
    )


def _status(answer: Any) -> dict[str, Any]:
    return dict(answer) | {part: _listed(answer[part]) for part in ("tasks", "kinds", "workers", "errors")}


def _claimed(token: str) -> Callable[[Any], Claimed]:
    def read(answer: Any) -> Claimed:
        due = answer["next_due_seconds"]
        tasks = tuple(_task(row, token) for row in _listed(answer["tasks"]))
        return Claimed(tasks, None if due is None else float(due), bool(answer["suspects"]))

    return read


def _task(row: Mapping[str, Any], token: str) -> Task:
    return Task(
        row["id"],
        token,
        row["kind"],
        row["project_id"],
        row["user_id"],
        row["source_image_url"],
        row["text_prompt"],
        row["params"],
        int(row["attempts"]),
        int(row["max_attempts"]),
        int(row["deaths"]),
        float(row["waited_seconds"]),
    )


def _outcome(outcome: Outcome) -> dict[str, Any]:
    """As maskd.settle reads it; what is not said is left out."""
    said: dict[str, Any] = {"id": outcome.id, "token": outcome.token, "fate": outcome.fate.value, **json.loads(outcome.values)}
    if outcome.code is not None:
        said |= {"code": outcome.code, "message": outcome.message}
    if outcome.delay_seconds:
        said["delay"] = outcome.delay_seconds
    if outcome.wrote:
        said["wrote"] = True
    return said
