"""TaskStore over HTTP: each method calls one function public.maskd_… by PostgREST, with a project's URL and service key alone.

Enters: SUPABASE_URL and a service key. Leaves: values of `storage.base`. Every function may be replayed, since a reply may be
lost. Neither the key nor a body ever stands in an error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
from postgrest import APIError
from supabase import AsyncClient, AsyncClientOptions, acreate_client

from storage.base import (
    Beat,
    Claimed,
    ConfigurationError,
    Outcome,
    RefusedError,
    SchemaError,
    Task,
    Tombstone,
    UnavailableError,
    Verdict,
)
from storage.schema import migration_files

CONNECT_SECONDS_MAX = 5.0
CONNECTIONS_MAX = 8
SENTENCE_CHARACTERS_MAX = 500
UNKNOWN_FUNCTION = "PGRST202"
REFUSED = ("28", "3D", "3F", "42501", "42883", "PGRST106", "PGRST3")  # authorization, schema, grant, function; PGRST3: tokens
PASSING = ("PGRST00", "08", "25", "40", "53", "55", "57", "58", "XX")  # PGRST00: it cannot reach its database or its cache
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)  # a connection that had gone stale, for one: asked again once


def translate(status: int, code: str, message: str) -> Exception:
    """What an answer that is no success means to the rest of maskd: by PostgREST's or Postgres' code, else by the HTTP status."""
    sentence = f"Supabase answered {status} {code}: {message}"[:SENTENCE_CHARACTERS_MAX]
    if code == UNKNOWN_FUNCTION:
        return SchemaError(
            "Supabase does not know maskd's functions; run: maskd migrate (or, if that was done just now, reload its schema"
            " cache: notify pgrst, 'reload schema')"
        )
    if status in (401, 403) or code.startswith(REFUSED):
        return ConfigurationError(f"{sentence}; is SUPABASE_SERVICE_KEY this project's service key?")
    if code.startswith(PASSING) or status in (408, 425, 429) or status >= 500:
        return UnavailableError(sentence)
    if not code and status != 413:  # no PostgREST speaks there: another server, a redirection
        return ConfigurationError(f"{sentence}; is SUPABASE_URL the project's address?")
    return RefusedError(sentence)


class SupabaseStore:
    """TaskStore by RPC. One client, made by `open`; a lost connection is replaced by the next call."""

    def __init__(self, url: str, key: str, *, timeout_seconds: float = 10.0) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._timeout = timeout_seconds
        self._http: httpx.AsyncClient | None = None
        self._client: AsyncClient | None = None

    async def open(self) -> None:
        try:
            await self._connect()
            await self._check_version()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        if self._http is not None:
            await self._http.aclose()
        self._http = self._client = None

    async def claim(self, worker: str, token: str, kinds: Sequence[str], most: int) -> Claimed:
        return _claimed(token, await self._call("claim", worker=worker, token=token, kinds=list(kinds), most=most))

    async def claim_suspects(self, worker: str, token: str, kinds: Sequence[str], most: int) -> Claimed:
        return _claimed(token, await self._call("claim_suspects", worker=worker, token=token, kinds=list(kinds), most=most))

    async def settle(self, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Verdict]:
        rows = await self._call("settle", outcomes=[_outcome(outcome) for outcome in outcomes])
        return {(row["id"], row["token"]): Verdict(row["verdict"]) for row in rows}

    async def beat(self, beat: Beat) -> list[tuple[str, str]]:
        rows = await self._call(
            "beat",
            worker=beat.worker,
            lease_seconds=beat.lease_seconds,
            info=dict(beat.info),
            kinds=list(beat.kinds),
            held_ids=[task_id for task_id, _ in beat.held],
            held_tokens=[token for _, token in beat.held],
            begun_ids=list(beat.begun_ids),
            open_tokens=list(beat.open_tokens),
        )
        return [(row["id"], row["token"]) for row in rows]

    async def rescue(self, worker: str, unserved_seconds: float) -> int:
        return int(await self._call("rescue", worker=worker, unserved_seconds=unserved_seconds))

    async def bury(self, worker: str, begun_ids: Sequence[str]) -> int:
        return int(await self._call("bury", worker=worker, begun_ids=list(begun_ids)))

    async def leave(self, worker: str) -> None:
        await self._call("leave", worker=worker)

    async def tombstones(self, most: int) -> list[Tombstone]:
        return [Tombstone(row["id"], row["prefix"]) for row in await self._call("due_tombstones", most=most)]

    async def bury_tombstones(self, ids: Sequence[int]) -> None:
        await self._call("bury_tombstones", ids=list(ids))

    async def masks_of(self, task_id: str, project_id: str) -> str | None:
        address: str | None = await self._call("masks_of", task=task_id, project=project_id)
        return address

    async def owner_of(self, project_id: str) -> str | None:
        user: str | None = await self._call("owner_of", project=project_id)
        return user

    async def key_templates(self) -> list[str]:
        return [str(template) for template in await self._call("key_templates")]

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = await self._call("status")
        return found

    async def checkup(self) -> dict[str, Any]:
        found: dict[str, Any] = await self._call("checkup")
        return found

    async def probe(self) -> None:
        await self._call("version")

    async def _connect(self) -> None:
        self._http = httpx.AsyncClient(
            http2=False,
            timeout=httpx.Timeout(self._timeout, connect=min(CONNECT_SECONDS_MAX, self._timeout)),
            limits=httpx.Limits(max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX),
            event_hooks={"response": [self._check]},
        )
        options = AsyncClientOptions(auto_refresh_token=False, persist_session=False, httpx_client=self._http)
        try:
            self._client = await acreate_client(self._url, self._key, options)
        except Exception as error:  # it looks at the form of its arguments only, and may quote them
            raise ConfigurationError("SUPABASE_URL or SUPABASE_SERVICE_KEY is not understood") from error

    async def _check_version(self) -> None:
        applied = set(await self._call("versions"))
        missing = [version for file in migration_files() if (version := file.name.partition("_")[0]) not in applied]
        if missing:
            raise SchemaError(f"The database schema lacks {len(missing)} migration(s), first {missing[0]}; run: maskd migrate")

    async def _call(self, function: str, **arguments: Any) -> Any:
        """The answer of public.maskd_<function>, within the time-out."""
        assert self._client is not None, "open() comes first"
        call = self._client.rpc(f"maskd_{function}", arguments)
        try:
            async with asyncio.timeout(self._timeout):
                try:
                    return (await call.execute()).data
                except BROKEN:
                    return (await call.execute()).data
        except (httpx.HTTPError, TimeoutError) as error:
            raise UnavailableError(f"Supabase does not answer ({type(error).__name__})") from None  # a request has headers
        except (APIError, httpx.InvalidURL) as error:
            raise UnavailableError(f"Supabase's answer is not understood ({type(error).__name__})") from None
        except (ValueError, RecursionError) as error:  # what JSON cannot say: NaN, half a character
            raise RefusedError(f"the arguments of maskd_{function} cannot be sent: {type(error).__name__}") from None

    async def _check(self, response: httpx.Response) -> None:
        """Raises for whatever is no JSON of a success; postgrest's own error would not tell the status."""
        if response.is_success:
            if not response.headers.get("content-type", "").startswith("application/json"):
                raise UnavailableError("Supabase's answer is not understood (no JSON)")
            return
        await response.aread()
        try:
            body = json.loads(response.content)
            code, message = str(body.get("code") or ""), str(body.get("message") or body.get("error") or response.reason_phrase)
        except (ValueError, AttributeError):
            code, message = "", response.reason_phrase
        raise translate(response.status_code, code, message.replace(self._key, "***"))


def _claimed(token: str, answer: Mapping[str, Any]) -> Claimed:
    tasks = tuple(
        Task(
            row["id"],
            token,
            row["kind"],
            row["project_id"],
            row["user_id"],
            row["source_image_url"],
            row["text_prompt"],
            row["params"],
            row["attempts"],
            row["max_attempts"],
            row["deaths"],
            row["waited_seconds"],
        )
        for row in answer["tasks"]
    )
    return Claimed(tasks, answer["next_due_seconds"], bool(answer["suspects"]))


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
