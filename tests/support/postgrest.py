"""A stand-in for PostgREST behind Supabase's gateway, on a real Postgres: POST /rest/v1/rpc/<function>.

As there: the key decides the role, the call runs in a transaction of its own under that role with `request.jwt.claims`, named
JSON arguments become values by the function's own types, and errors are {code, message, details, hint} under an HTTP status.
Faults are switched on by `Faults`. It knows functions of `public` with one result, and nothing else.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from aiohttp import web
from support.loops import loop_in_thread, served

SERVICE_KEY = "sb_secret_of-this-test_0123456789"
PUBLISHABLE_KEY = "sb_publishable_of-this-test"
JWT_SECRET = b"the-secret-of-this-test-signs-tokens"
FUNCTION = """
select p.oid::regproc::text as name, coalesce(p.proargnames, '{}') as names,
       p.provolatile <> 'v' as reads_only,
       array(select format_type(t, null) from unnest(p.proargtypes) with ordinality u (t, place) order by place) as types
  from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = 'public' and p.proname = $1
"""
STATUS = {"23503": 409, "23505": 409, "25006": 405, "28000": 403, "42883": 404, "42P01": 404, "42P17": 500, "P0001": 400}
CLASSES = {"08": 503, "09": 500, "0L": 403, "0P": 403, "25": 500, "28": 403, "2D": 500, "38": 500, "39": 500, "3B": 500,
           "40": 500, "53": 503, "54": 500, "55": 500, "57": 500, "58": 500, "F0": 500, "HV": 500, "XX": 500}  # fmt: skip


@dataclass(slots=True, eq=False)
class Faults:
    """What goes wrong from now on; each is undone by setting it back."""

    lose_replies: dict[str, int] = field(default_factory=dict)
    """By function: so many calls are committed, and the connection ends without a reply."""
    lost: int = 0
    status: int | None = None
    """Every call is answered by this status and a page of HTML, as by a proxy."""
    error: tuple[int, dict[str, Any]] | None = None
    """Every call is answered so."""
    delay_seconds: float = 0.0
    """Before each call."""
    black_hole: bool = False
    """Calls are taken and never answered, nor carried out."""


@dataclass(slots=True, eq=False)
class PostgrestServer:
    """A running stand-in: its address, its faults, and how often each function was called."""

    url: str
    faults: Faults
    calls: dict[str, int]


class Refusal(Exception):  # noqa: N818 - an answer, not a fault of the stand-in
    """An answer other than the function's."""

    def __init__(self, status: int, code: str | None, message: str, details: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "message": message, "details": details, "hint": hint}
        if code is None:  # the gateway's own form
            self.body = {"message": message, "hint": hint}


class Postgrest:
    """The routes. `dsn` is a superuser's, whose connections take on the caller's role."""

    def __init__(self, dsn: str, faults: Faults) -> None:
        self._dsn = dsn
        self._faults = faults
        self._pool: asyncpg.Pool[Any] | None = None
        self.calls: dict[str, int] = {}

    def add_to(self, app: web.Application) -> None:
        app.router.add_post("/rest/v1/rpc/{function}", self._answer)
        app.on_startup.append(self._start)
        app.on_cleanup.append(self._stop)

    async def _start(self, _app: web.Application) -> None:
        self._pool = await asyncpg.create_pool(self._dsn, min_size=0, max_size=10, statement_cache_size=0)

    async def _stop(self, _app: web.Application) -> None:
        if self._pool is not None:
            self._pool.terminate()

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        faults, function = self._faults, request.match_info["function"]
        body = await request.text()
        if faults.black_hole:
            await asyncio.Event().wait()
        await asyncio.sleep(faults.delay_seconds)
        if faults.status is not None:
            return web.Response(status=faults.status, text="<html>no</html>", content_type="text/html")
        if faults.error is not None:
            return web.json_response(faults.error[1], status=faults.error[0])
        self.calls[function] = self.calls.get(function, 0) + 1
        try:
            text = await self._call(function, body, claims_of(request))
        except Refusal as refusal:
            return web.json_response(refusal.body, status=refusal.status)
        if faults.lose_replies.get(function, 0) > 0:
            faults.lose_replies[function] -= 1
            faults.lost += 1
            if request.transport is not None:
                request.transport.abort()
        return web.Response(text=text, content_type="application/json")

    async def _call(self, function: str, body: str, claims: dict[str, Any]) -> str:
        assert self._pool is not None
        try:
            async with self._pool.acquire() as connection:
                statement, reads_only = await _statement(connection, function, body)
                async with connection.transaction(readonly=reads_only):
                    role = claims["role"]
                    await connection.execute(f"set local role {role}")
                    await connection.execute("select set_config('request.jwt.claims', $1, true)", json.dumps(claims))
                    return str(await connection.fetchval(statement, body or "{}"))
        except asyncpg.PostgresError as error:
            raise _refusal_of(error, claims["role"]) from error
        except OSError as error:
            raise Refusal(503, "PGRST000", "Database connection error. Retrying the connection.") from error


async def _statement(connection: Any, function: str, body: str) -> tuple[str, bool]:
    """The call, its arguments read from the JSON in $1 by the types of the function that has these very names; whether it may
    only read, as functions may that are not volatile."""
    try:
        named = sorted(json.loads(body or "{}"))
    except (ValueError, TypeError) as error:
        raise Refusal(400, "PGRST102", "Empty or invalid json") from error
    for found in await connection.fetch(FUNCTION, function):
        names = list(found["names"])[: len(found["types"])]
        if sorted(names) == named:
            if not names:
                answer = f"coalesce(to_json(public.{function}())::text, 'null')"
                return f"select {answer} where $1::text is not null", found["reads_only"]
            columns = ", ".join(f'"{name}" {kind}' for name, kind in zip(names, found["types"], strict=True))
            values = ", ".join(f'"{name}" => _."{name}"' for name in names)
            answer = f"coalesce(to_json(public.{function}({values}))::text, 'null')"
            return f"select {answer} from json_to_record($1::json) as _({columns})", found["reads_only"]
    raise Refusal(
        404,
        "PGRST202",
        f"Could not find the function public.{function}({', '.join(named)}) in the schema cache",
        f"Searched for the function public.{function} with parameters {', '.join(named)}, but no matches were found.",
    )


def _refusal_of(error: asyncpg.PostgresError, role: str) -> Refusal:
    code = error.sqlstate or "XX000"
    if code.startswith("PT") and code[2:].isdigit():
        status = int(code[2:])
    elif code == "42501":
        status = 401 if role == "anon" else 403
    else:
        status = STATUS.get(code, CLASSES.get(code[:2], 400))
    return Refusal(status, code, str(error.args[0]), getattr(error, "detail", None), getattr(error, "hint", None))


def claims_of(request: web.Request) -> dict[str, Any]:
    """Who calls, as the gateway and PostgREST tell by the two headers."""
    key = request.headers.get("apikey")
    bearer = request.headers.get("Authorization", "").removeprefix("Bearer ")
    if key is None:
        raise Refusal(401, None, "No API key found in request", hint="No `apikey` request header or url param was found.")
    known = {SERVICE_KEY: "service_role", PUBLISHABLE_KEY: "anon"}
    if key not in known and _claims(key) is None:
        raise Refusal(401, None, "Invalid API key", hint="Double check your Supabase `anon` or `service_role` API key.")
    if bearer in known or not bearer:
        return {"role": known.get(key, "anon")}
    claims = _claims(bearer)
    if claims is None:
        raise Refusal(401, "PGRST301", "No suitable key or wrong key type")
    return {"role": "anon", **claims}


def token(**claims: Any) -> str:
    """A token signed as the project's legacy keys and its users' tokens are."""
    head, body = _encoded({"alg": "HS256", "typ": "JWT"}), _encoded(claims)
    return f"{head}.{body}.{_signature(f'{head}.{body}')}"


def _claims(token: str) -> dict[str, Any] | None:
    parts = token.split(".")
    if len(parts) != 3 or not hmac.compare_digest(_signature(".".join(parts[:2])), parts[2]):
        return None
    found: dict[str, Any] = json.loads(base64.urlsafe_b64decode(parts[1] + "=="))
    return found


def _signature(text: str) -> str:
    return base64.urlsafe_b64encode(hmac.new(JWT_SECRET, text.encode(), hashlib.sha256).digest()).rstrip(b"=").decode()


def _encoded(value: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


@contextmanager
def postgrest(dsn: str) -> Iterator[PostgrestServer]:
    """A stand-in on that database."""
    faults = Faults()
    routes = Postgrest(dsn, faults)

    async def make() -> web.Application:
        app = web.Application(client_max_size=16 * 1024**2)
        routes.add_to(app)
        return app

    with loop_in_thread() as loop, served(loop, make) as port:
        yield PostgrestServer(f"http://127.0.0.1:{port}", faults, routes.calls)
