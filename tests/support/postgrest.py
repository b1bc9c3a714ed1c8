"""A stand-in for PostgREST behind Supabase's gateway, on a real Postgres: /rest/v1/rpc/<function> and /rest/v1/<table>.

As there: key and token decide the role, the call runs in a transaction of its own under that role with `request.jwt.claims`,
named JSON arguments become values by the types of the function, and errors are {code, message, details, hint} under a status.
Faults are switched on by `Faults`. It knows functions of `public` with one result, what `postgrest_tables` says of tables, and
the public half of the key that signs users' tokens (/auth/v1/.well-known/jwks.json).
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from aiohttp import web
from support.loops import loop_in_thread, served
from support.postgrest_tables import Answer, Refusal, TableCall
from support.tokens import AUTH, PUBLISHABLE_KEY, SERVICE_KEY

FUNCTION = """
select p.oid::regproc::text as name, coalesce(p.proargnames, '{}') as names,
       p.provolatile <> 'v' as reads_only, p.pronargdefaults as defaults,
       array(select format_type(t, null) from unnest(p.proargtypes) with ordinality u (t, place) order by place) as types
  from pg_proc p join pg_namespace n on n.oid = p.pronamespace where n.nspname = 'public' and p.proname = $1
"""
READABLE = """
select attname as name from pg_attribute
 where attrelid = $2::text::regclass and attnum > 0 and not attisdropped
   and has_column_privilege($1::text, attrelid, attnum, 'select')
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
    text: str | None = None
    """Every call is answered by this, as JSON of a success."""
    endless: bool = False
    """Answers begin and never end."""
    unknown: set[str] = field(default_factory=set)
    """Functions that the schema cache does not know, though they are there."""
    delay_seconds: float = 0.0
    """Before each call."""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Beside each answer."""
    black_hole: bool = False
    """Calls are taken and never answered, nor carried out."""


@dataclass(slots=True, eq=False)
class PostgrestServer:
    """A running stand-in: its address, its faults, and how often each function was called."""

    url: str
    faults: Faults
    calls: dict[str, int]


class Postgrest:
    """The routes. `dsn` is a superuser's, whose connections take on the caller's role."""

    def __init__(self, dsn: str, faults: Faults) -> None:
        self._dsn = dsn
        self._faults = faults
        self._pool: asyncpg.Pool[Any] | None = None
        self.calls: dict[str, int] = {}

    def add_to(self, app: web.Application) -> None:
        app.router.add_post("/rest/v1/rpc/{function}", self._answer)
        app.router.add_route("*", "/rest/v1/{table}", self._answer)
        app.router.add_get("/auth/v1/.well-known/jwks.json", self._public_keys)
        app.on_startup.append(self._start)
        app.on_cleanup.append(self._stop)

    async def _start(self, _app: web.Application) -> None:
        self._pool = await asyncpg.create_pool(self._dsn, min_size=0, max_size=10, statement_cache_size=0)

    async def _stop(self, _app: web.Application) -> None:
        if self._pool is not None:
            self._pool.terminate()

    async def _public_keys(self, _request: web.Request) -> web.Response:
        self.calls["jwks"] = self.calls.get("jwks", 0) + 1
        return web.json_response(AUTH.jwks())

    async def _answer(self, request: web.Request) -> web.StreamResponse:
        faults = self._faults
        called = request.match_info.get("function") or f"{request.method} {request.match_info['table']}"
        body = await request.text()
        if faults.black_hole:
            await asyncio.Event().wait()
        await asyncio.sleep(faults.delay_seconds)
        if faults.status is not None:
            return web.Response(status=faults.status, text="<html>no</html>", content_type="text/html")
        if faults.error is not None:
            return web.json_response(faults.error[1], status=faults.error[0])
        if faults.text is not None:
            return web.Response(text=faults.text, content_type="application/json")
        if faults.endless:
            return await _endless(request)
        if called in faults.unknown:
            return web.json_response(Refusal(404, "PGRST202", f"Could not find the function public.{called}").body, status=404)
        self.calls[called] = self.calls.get(called, 0) + 1
        try:
            answer = await self._call(request, body, claims_of(request))
        except Refusal as refusal:
            return web.json_response(refusal.body, status=refusal.status)
        if faults.lose_replies.get(called, 0) > 0:
            faults.lose_replies[called] -= 1
            faults.lost += 1
            if request.transport is not None:
                request.transport.abort()
        return web.Response(
            status=answer.status, text=answer.text, headers={**answer.headers, **faults.headers}, content_type="application/json"
        )

    async def _call(self, request: web.Request, body: str, claims: dict[str, Any]) -> Answer:
        function, table = request.match_info.get("function"), request.match_info.get("table", "")
        call = None if function else TableCall.of(request.method, table, request.query, request.headers, body)
        async with self._as(claims) as connection:
            if function:
                statement, reads_only = await _statement(connection, function, body)
                if reads_only:
                    await connection.execute("set transaction read only")
                await _become(connection, claims)
                return Answer(200, str(await connection.fetchval(statement, body or "{}")))
            assert call is not None
            await _become(connection, claims)
            total = await connection.fetchval(call.count) if call.count else None
            rows = [row[0] for row in await connection.fetch(call.statement)]
            return call.answer(rows, total)  # a refusal undoes what was done

    async def visible(self, claims: dict[str, Any], table: str, row_id: str) -> dict[str, Any] | None:
        """A row as that caller may see it: the columns granted, if its policies show the row at all; else None."""
        async with self._as(claims) as connection:
            columns = await connection.fetch(READABLE, claims["role"], f"public.{table}")
            if not columns:
                return None
            await _become(connection, claims)
            names = ", ".join(f'"{column["name"]}"' for column in columns)
            found = await connection.fetchval(
                f"select to_json(_) from (select {names} from public.{table} where id = $1) _", row_id
            )
            return None if found is None else dict(json.loads(found))

    @asynccontextmanager
    async def _as(self, claims: dict[str, Any]) -> AsyncIterator[Any]:
        """A connection in a transaction; what the database refuses becomes a Refusal."""
        assert self._pool is not None
        try:
            async with self._pool.acquire() as connection, connection.transaction():
                yield connection
        except asyncpg.PostgresError as error:
            raise _refusal_of(error, claims["role"]) from error
        except OSError as error:
            raise Refusal(503, "PGRST000", "Database connection error. Retrying the connection.") from error


async def _become(connection: Any, claims: dict[str, Any]) -> None:
    """From here on the transaction is the caller's."""
    await connection.execute(f"set local role {claims['role']}")
    await connection.execute("select set_config('request.jwt.claims', $1, true)", json.dumps(claims))


async def _endless(request: web.Request) -> web.StreamResponse:
    answer = web.StreamResponse(headers={"content-type": "application/json"})
    await answer.prepare(request)
    with suppress(ConnectionError):
        while True:
            await answer.write(b" " * (1 << 20))
    return answer


async def _statement(connection: Any, function: str, body: str) -> tuple[str, bool]:
    """The call, its arguments read from the JSON in $1 by the types of the function that has these names, and defaults for the
    others; whether it may only read, as functions may that are not volatile."""
    try:
        named = sorted(json.loads(body or "{}"))
    except (ValueError, TypeError) as error:
        raise Refusal(400, "PGRST102", "Empty or invalid json") from error
    for found in await connection.fetch(FUNCTION, function):
        types = dict(zip(list(found["names"]), found["types"], strict=False))
        needed = list(types)[: len(types) - found["defaults"]]
        if set(needed) <= set(named) <= set(types):
            if not named:
                answer = f"coalesce(to_json(public.{function}())::text, 'null')"
                return f"select {answer} where $1::text is not null", found["reads_only"]
            columns = ", ".join(f'"{name}" {types[name]}' for name in named)
            values = ", ".join(f'"{name}" => _."{name}"' for name in named)
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
    claimed = {"role": known[key]} if key in known else AUTH.claims(key)
    if claimed is None:
        raise Refusal(401, None, "Invalid API key", hint="Double check your Supabase `anon` or `service_role` API key.")
    if bearer not in known and bearer:
        claimed = AUTH.claims(bearer)
    if claimed is None:
        raise Refusal(401, "PGRST301", "No suitable key or wrong key type")
    if claimed.get("exp", time.time()) < time.time() - 30:
        raise Refusal(401, "PGRST303", "JWT expired")
    return {"role": "anon", **claimed}


@contextmanager
def postgrest(dsn: str, faults: Faults | None = None) -> Iterator[PostgrestServer]:
    """A stand-in on that database."""
    faults = Faults() if faults is None else faults
    routes = Postgrest(dsn, faults)

    async def make() -> web.Application:
        app = web.Application(client_max_size=16 * 1024**2)
        routes.add_to(app)
        return app

    with loop_in_thread() as loop, served(loop, make) as port:
        yield PostgrestServer(f"http://127.0.0.1:{port}", faults, routes.calls)
