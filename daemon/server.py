"""The HTTP endpoint: /health, /ready, /metrics. Transport only; what it tells is handed in.

Binds to this host by default; without a key it answers only what comes from this host itself, by no tunnel and under no other
name. On a public address /metrics asks for the key, and /health without it says only ok or not.
"""

from __future__ import annotations

import errno
import hmac
import uuid
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

import structlog
from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from storage.base import ConfigurationError

log = structlog.get_logger(__name__)

Health = Callable[[], dict[str, Any]]
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
LOOPBACK = ("127.0.0.1", "localhost", "::1")
RELAYED = ("X-Forwarded-For", "Forwarded")


class Server:
    """The endpoint of one worker. `health()` describes it; its "status" is ok, starting or degraded."""

    def __init__(self, host: str, port: int, api_key: str | None, health: Health) -> None:
        self._host = host
        self._port = port
        self._api_key = api_key
        self._health = health
        self._runner: web.AppRunner | None = None
        self.port: int | None = None

    async def start(self) -> None:
        """Bind and serve; port 0 takes a free one, see `port`. ConfigurationError when it cannot be had."""
        app = web.Application(middlewares=[_errors, self._only_from_here])
        app.router.add_get("/health", self._get_health)
        app.router.add_get("/ready", self._get_ready)
        metrics = make_aiohttp_handler()

        async def get_metrics(request: web.Request) -> web.StreamResponse:
            self._require_key(request)
            response: web.StreamResponse = await metrics(request)
            return response

        app.router.add_get("/metrics", get_metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, self._host, self._port).start()
        except OSError as error:
            await self._runner.cleanup()
            if error.errno == errno.EADDRINUSE:
                raise ConfigurationError(f"MASKD_PORT {self._port} is in use: choose another") from error
            raise ConfigurationError(f"MASKD_HOST {self._host} with MASKD_PORT {self._port} cannot be bound: {error}") from error
        self.port = int(self._runner.addresses[0][1])
        log.info("server.listening", host=self._host, port=self.port)

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    async def _get_health(self, request: web.Request) -> web.Response:
        health = self._health()
        body = health if self._may_see(request) else {"status": health["status"]}
        return web.json_response(body)

    async def _get_ready(self, _request: web.Request) -> web.Response:
        status = self._health()["status"]
        return web.json_response({"status": status}, status=200 if status == "ok" else 503)

    @web.middleware
    async def _only_from_here(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Without a key, a request that a tunnel relayed or that a page of another name sent is refused."""
        if self._api_key is None and (_name_of(request) not in LOOPBACK or any(name in request.headers for name in RELAYED)):
            raise web.HTTPForbidden(reason="without API_SECRET_KEY only this host itself is answered")
        return await handler(request)

    def _may_see(self, request: web.Request) -> bool:
        if self._host in LOOPBACK and self._api_key is None:
            return True
        given = request.headers.get("X-API-Key", "")
        return self._api_key is not None and hmac.compare_digest(_bytes(given), _bytes(self._api_key))

    def _require_key(self, request: web.Request) -> None:
        if self._host not in LOOPBACK and not self._may_see(request):
            raise web.HTTPUnauthorized(reason="send the API key as X-API-Key")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors are {"error": {"code", "message", "request_id"}}; a traceback goes to the log alone."""
    request_id = uuid.uuid4().hex
    try:
        return await handler(request)
    except web.HTTPException as error:
        return _error(error.status, HTTPStatus(error.status).phrase.lower().replace(" ", "_"), error.reason, request_id)
    except Exception:
        log.exception("server.failed", path=request.path, request_id=request_id)
        return _error(500, "internal", "Something went wrong inside maskd; the log says what under this request id.", request_id)


def _name_of(request: web.Request) -> str:
    """The host that the request asks for, without its port."""
    host = request.headers.get("Host", "").lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


def _bytes(header: str) -> bytes:
    return header.encode("utf-8", "surrogateescape")


def _error(status: int, code: str, message: str, request_id: str) -> web.Response:
    return web.json_response({"error": {"code": code, "message": message, "request_id": request_id}}, status=status)
