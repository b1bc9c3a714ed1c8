"""A stand-in for Supabase Realtime: /realtime/v1/websocket, in the Phoenix frames that the real libraries speak (vsn 1.0.0: JSON
objects; 2.0.0: arrays).

It does what was seen of the server: SUBSCRIBED some time before it listens, duplicate joins that close the older channel under
its own ref, changes by event and filter, at most once; to a user only own rows, and of them the columns granted. Faults are
switched on by the attributes and methods of `RealtimeServer`. What changes in a database comes in by `follow`, or by hand
through `announce`.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import asyncpg
from aiohttp import WSMsgType, web
from support.loops import Loop, loop_in_thread, served
from support.postgrest import Faults, Postgrest, PostgrestServer, Refusal, claims_of

TABLE = "segmentation_results"
READY_SECONDS = 0.05
ARRAYS = web.ResponseKey("arrays", bool)
FOLLOW = f"""
create or replace function public.stand_in_change() returns trigger language plpgsql as $$
begin
  perform pg_notify('stand_in', json_build_object('id', new.id, 'type', tg_op, 'status', new.status)::text);
  return null;
end $$;
create or replace trigger stand_in_change after insert or update of status on public.{TABLE}
  for each row execute function public.stand_in_change();
"""


@dataclass(slots=True, eq=False)
class Channel:
    """A topic that somebody has joined."""

    socket: web.WebSocketResponse
    topic: str
    join_ref: str
    bindings: list[dict[str, Any]]
    claims: dict[str, Any]
    listens: bool = False


@dataclass(slots=True, eq=False)
class RealtimeServer:
    """The stand-in. Attributes may be set from any thread; methods act on every channel that is joined now."""

    loop: Loop
    url: str = ""
    handshake_status: int | None = None
    silent: bool = False
    """Changes are not told."""
    unauthorized: bool = False
    """Changes come as `Error 401`, as without a grant."""
    other_bindings: bool = False
    """Joins are answered with other filters than were asked for."""
    never_ready: bool = False
    """Joins are answered, but nobody listens to the database."""
    look: Callable[[dict[str, Any], str, str], Awaitable[dict[str, Any] | None]] | None = None
    """(claims, table, id) to the row as that user may see it; without it everybody is the service."""
    joins: int = 0
    channels: list[Channel] = field(default_factory=list)
    sending: set[asyncio.Task[None]] = field(default_factory=set)

    def announce(self, task_id: str, change: str = "INSERT", status: str = "pending") -> None:
        """A row was inserted or updated."""
        self.loop.call(self._announce, task_id, change, status)

    def expire(self) -> None:
        """The token of every channel has expired."""
        self._each(
            "system", {"channel": "x", "extension": "system", "status": "error", "message": "Token has expired"}, close=True
        )

    def fail(self) -> None:
        """Every channel's process crashes."""
        self._each("phx_error", {})

    def stumble(self) -> None:
        """The server cannot read the database for a moment: it says so, and goes on sending afterwards."""
        self._each("system", {"channel": "x", "extension": "postgres_changes", "status": "error", "message": "timeout"})

    def hang_up(self) -> None:
        """Every channel is closed."""
        self._each("phx_close", {}, close=True)

    def send_too_much(self) -> None:
        """A frame of more than 1 MiB."""
        self._each("broadcast", {"event": "x", "payload": {"x": "x" * (1 << 20)}})

    def _each(self, event: str, payload: dict[str, Any], close: bool = False) -> None:
        def act() -> None:
            for channel in list(self.channels):
                self._send(channel, event, payload, channel.join_ref if event.startswith("phx") else None)
                if close:
                    self._send(channel, "phx_close", {}, channel.join_ref)
                    self.channels.remove(channel)

        self.loop.call(act)

    def _announce(self, task_id: str, change: str, status: str) -> None:
        for channel in self.channels:
            if self.silent or not channel.listens:
                continue
            if self.look is None or channel.claims["role"] == "service_role":
                self._tell(channel, change, {"id": task_id, "status": status}, self._change(task_id, change))
            else:
                self._later(self._announce_own(self.look, channel, task_id, change))

    async def _announce_own(self, look: Any, channel: Channel, task_id: str, change: str) -> None:
        row = await look(channel.claims, TABLE, task_id)
        if row is not None:
            columns = [{"name": name, "type": "text"} for name in row]
            self._tell(channel, change, row, self._change(task_id, change) | {"columns": columns, "record": row})

    def _tell(self, channel: Channel, change: str, row: dict[str, Any], data: dict[str, Any]) -> None:
        """Send a change to the bindings that asked for it: its kind, and `column=eq.value` or no filter."""
        ids = []
        for binding in channel.bindings:
            column, _, value = (binding.get("filter") or f"id=eq.{row['id']}").partition("=eq.")
            if binding["event"] in (change, "*") and str(row.get(column)) == value:
                ids.append(binding["id"])
        if ids:
            self._send(channel, "postgres_changes", {"ids": ids, "data": data})

    def _change(self, task_id: str, change: str) -> dict[str, Any]:
        data: dict[str, Any] = {"schema": "public", "table": TABLE, "type": change}
        if self.unauthorized:
            return data | {"commit_timestamp": None, "columns": [], "record": {}, "errors": ["Error 401: Unauthorized"]}
        columns = [{"name": "id", "type": "uuid"}]
        return data | {"commit_timestamp": "2026-01-01T00:00:00Z", "columns": columns, "record": {"id": task_id}, "errors": None}

    def _send(self, channel: Channel, event: str, payload: dict[str, Any], ref: str | None = None) -> None:
        self._later(_send(channel.socket, {"event": event, "payload": payload, "topic": channel.topic, "ref": ref}))

    def _later(self, coroutine: Any) -> None:
        task = self.loop.loop.create_task(coroutine)
        self.sending.add(task)
        task.add_done_callback(self.sending.discard)

    async def answer(self, request: web.Request) -> web.StreamResponse:
        """One connection."""
        if self.handshake_status is not None:
            return web.json_response({"error": "no"}, status=self.handshake_status)
        try:
            claims = _claims(request, "")
        except Refusal:
            return web.json_response({"error": "no"}, status=403)
        socket = web.WebSocketResponse()
        socket[ARRAYS] = request.query.get("vsn") == "2.0.0"
        await socket.prepare(request)
        try:
            async for message in socket:
                if message.type != WSMsgType.TEXT:
                    continue
                frame = json.loads(message.data)
                if isinstance(frame, list):
                    frame = dict(zip(("join_ref", "ref", "topic", "event", "payload"), frame, strict=True))
                with suppress(Refusal):  # a join with a bad token is not answered, and ends as TIMED_OUT
                    token = frame["payload"].get("access_token") or ""
                    await self._hear(socket, frame, _claims(request, token) if token else claims)
        finally:
            self.channels = [channel for channel in self.channels if channel.socket is not socket]
        return socket

    async def _hear(self, socket: web.WebSocketResponse, frame: dict[str, Any], claims: dict[str, Any]) -> None:
        topic, ref = frame["topic"], frame["ref"]
        if frame["event"] == "phx_join":
            await self._join(socket, frame, claims)
        elif frame["event"] in ("heartbeat", "phx_leave"):
            await _reply(socket, topic, ref, {})
            self.channels = [each for each in self.channels if (each.socket, each.topic) != (socket, topic) or ref is None]

    async def _join(self, socket: web.WebSocketResponse, frame: dict[str, Any], claims: dict[str, Any]) -> None:
        self.joins += 1
        topic, ref = frame["topic"], frame["ref"]
        old = [each for each in self.channels if each.socket is socket and each.topic == topic]
        bindings = [binding | {"id": place + 7} for place, binding in enumerate(frame["payload"]["config"]["postgres_changes"])]
        channel = Channel(socket, topic, ref, bindings, claims)
        answered = [binding | {"filter": "status=eq.done"} for binding in bindings] if self.other_bindings else bindings
        await _reply(socket, topic, ref, {"postgres_changes": answered})
        for each in old:  # Phoenix closes the duplicate under its own ref, which the client takes for the new one
            self.channels.remove(each)
            await _send(socket, {"event": "phx_close", "payload": {}, "topic": topic, "ref": each.join_ref})
        self.channels.append(channel)
        if not self.never_ready:
            self._later(self._get_ready(channel))

    async def _get_ready(self, channel: Channel) -> None:
        await asyncio.sleep(READY_SECONDS)
        channel.listens = True
        payload = {"channel": "x", "extension": "postgres_changes", "status": "ok", "message": "Subscribed to PostgreSQL"}
        await _send(channel.socket, {"event": "system", "payload": payload, "topic": channel.topic, "ref": None})

    def follow(self, sql: asyncpg.Connection[Any]) -> Any:
        """Tell of every row that is inserted or changes its status, as that connection hears of it."""

        def heard(_connection: object, _pid: object, _channel: object, payload: object) -> None:
            change = json.loads(str(payload))
            self._announce(change["id"], change["type"], change["status"])

        return sql.add_listener("stand_in", heard)


def _claims(request: web.Request, token: str) -> dict[str, Any]:
    """Who asks, by the key in the address and the token of a join."""
    headers = {"apikey": request.query.get("apikey", ""), "Authorization": f"Bearer {token}"}
    return claims_of(request.clone(headers=headers))


async def _reply(socket: web.WebSocketResponse, topic: str, ref: str | None, response: dict[str, Any]) -> None:
    payload = {"status": "ok", "response": response}
    await _send(socket, {"event": "phx_reply", "payload": payload, "topic": topic, "ref": ref})


async def _send(socket: web.WebSocketResponse, frame: dict[str, Any]) -> None:
    with suppress(ConnectionError):  # who has gone hears nothing
        if not socket.closed:
            await socket.send_str(json.dumps(_as_array(frame) if socket[ARRAYS] else frame))


def _as_array(frame: dict[str, Any]) -> list[Any]:
    """A frame of protocol 2.0.0. What ends a channel names its join; elsewhere that may be left out."""
    ends = frame["event"] in ("phx_close", "phx_error")
    return [frame["ref"] if ends else None, None if ends else frame["ref"], frame["topic"], frame["event"], frame["payload"]]


@contextmanager
def realtime() -> Iterator[RealtimeServer]:
    """A stand-in that knows no database: changes are announced by hand."""
    with loop_in_thread() as loop:
        server = RealtimeServer(loop)

        async def make() -> web.Application:
            app = web.Application()
            app.router.add_get("/realtime/v1/websocket", server.answer)
            return app

        with served(loop, make) as port:
            server.url = f"http://127.0.0.1:{port}"
            yield server


@contextmanager
def supabase(dsn: str) -> Iterator[tuple[PostgrestServer, RealtimeServer]]:
    """Both stand-ins under one address, before one database, whose changes Realtime tells."""
    faults = Faults()
    with loop_in_thread() as loop:
        routes = Postgrest(dsn, faults)
        server = RealtimeServer(loop, look=routes.visible)

        async def follow(_app: web.Application) -> AsyncIterator[None]:
            sql = await asyncpg.connect(dsn)
            await sql.execute(FOLLOW)
            await server.follow(sql)
            yield
            sql.terminate()

        async def make() -> web.Application:
            app = web.Application(client_max_size=16 * 1024**2)
            routes.add_to(app)
            app.router.add_get("/realtime/v1/websocket", server.answer)
            app.cleanup_ctx.append(follow)
            return app

        with served(loop, make) as port:
            server.url = f"http://127.0.0.1:{port}"
            yield PostgrestServer(server.url, faults, routes.calls), server
