"""The HTTP endpoint: /health, /ready, /metrics, sessions and their page. Transport only; what it tells is handed in.

Binds to this host by default; without a key it answers only what comes from this host itself, by no tunnel and under no other
name. On a public address /metrics asks for the key, and /health without it says only ok or not.
"""

from __future__ import annotations

import errno
import math
import mimetypes
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any

import structlog
from aiohttp import web
from prometheus_client.aiohttp import make_aiohttp_handler

from daemon.log import hashed
from daemon.session_routes import LOOPBACK, Access, Handler, SessionRoutes, counted, cross_origin, is_foreign
from daemon.sessions import SessionError
from handlers.base import RejectedError
from storage.base import ConfigurationError, InvalidImageError, UnavailableError

log = structlog.get_logger(__name__)

Health = Callable[[], dict[str, Any]]
More = Callable[[], Awaitable[dict[str, Any]]]
RELAYED = (
    "Forwarded",
    "X-Forwarded-For",
    "X-Forwarded-Host",
    "X-Forwarded-Proto",
    "X-Real-IP",
    "Via",
    "CF-Connecting-IP",
)
STOP_SECONDS = 5.0
LINGER_SECONDS = 2.0
"""What a client still sends after it was refused is thrown away for so long, so that it reads the answer."""
HERE = Path(__file__).parent
PAGE = HERE / "page"
PAGE_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; connect-src 'self' blob: data:; "
    "style-src 'self' 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
STATUS = {
    "unauthorized": 401,
    "image_url_forbidden": 403,
    "image_missing": 404,
    "session_unknown": 404,
    "upload_timeout": 408,
    "embedding_unavailable": 409,
    "not_generated": 409,
    "superseded": 409,
    "body_too_large": 413,
    "image_too_large": 413,
    "image_invalid": 415,
    "busy": 429,
    "sessions_full": 429,
    "engine_unavailable": 503,
    "starting": 503,
    "timeout": 503,
}
"""By error code; what is not here is the client's mistake, 400."""


class Server:
    """The endpoint of one worker. `health()` describes it; its "status" is ok, starting or degraded. `look` comes before each
    scrape of metrics. `more()` knows what the database does, and is only asked for /health once the worker has begun."""

    def __init__(
        self,
        host: str,
        port: int,
        access: Access,
        health: Health,
        sessions: SessionRoutes | None = None,
        *,
        with_page: bool = False,
        look: Callable[[], Awaitable[None]] | None = None,
        more: More | None = None,
    ) -> None:
        self._host = host
        self._port = port
        self._access = access
        self._health = health
        self._more = more
        self._sessions = sessions
        self._page = PAGE if with_page else None
        self._look = look
        self._runner: web.AppRunner | None = None
        self.port: int | None = None

    async def start(self) -> None:
        """Bind and serve; port 0 takes a free one, see `port`. ConfigurationError when it cannot be had."""
        app = web.Application(middlewares=[cross_origin(self._access), _errors, self._only_from_here])
        app.router.add_get("/health", self._get_health)
        app.router.add_get("/ready", self._get_ready)
        metrics = make_aiohttp_handler()

        async def get_metrics(request: web.Request) -> web.StreamResponse:
            self._require_key(request)
            if self._look is not None:
                await self._look()
            response: web.StreamResponse = await metrics(request)
            return response

        app.router.add_get("/metrics", get_metrics)
        app.router.add_get("/openapi.json", _get_openapi)
        app.router.add_get("/", self._get_page)
        app.router.add_get("/page/{name}", self._get_page)
        if self._sessions is not None:
            self._sessions.add_to(app)
        self._runner = web.AppRunner(
            app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_SECONDS, lingering_time=LINGER_SECONDS
        )
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
        if not self._may_see(request):
            return web.json_response({"status": health["status"]})
        more = {} if self._more is None or health["status"] == "starting" else await self._more()
        return web.json_response(health | more)

    async def _get_page(self, request: web.Request) -> web.StreamResponse:
        """A file of the page, by its plain name."""
        names = {file.name: file for file in self._page.iterdir() if file.is_file()} if self._page and self._page.is_dir() else {}
        file = names.get(request.match_info.get("name", "index.html"))
        if file is None:
            raise web.HTTPNotFound(reason="there is nothing here")
        kind = mimetypes.guess_type(file.name)[0] or "application/octet-stream"
        return web.FileResponse(file, headers=PAGE_HEADERS | {"Content-Type": kind})

    async def _get_ready(self, _request: web.Request) -> web.Response:
        status = self._health()["status"]
        return web.json_response({"status": status}, status=200 if status == "ok" else 503)

    @web.middleware
    async def _only_from_here(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Without a key, a request that a tunnel relayed or that a page of another name sent is refused."""
        if self._access.api_key is None:
            relayed = any(name in request.headers for name in RELAYED)
            if relayed or _name_of(request) not in LOOPBACK or is_foreign(request, self._access):
                raise web.HTTPForbidden(reason="without API_SECRET_KEY only this host itself is answered")
        return await handler(request)

    def _may_see(self, request: web.Request) -> bool:
        return (self._host in LOOPBACK and self._access.api_key is None) or self._access.has_key(request)

    def _require_key(self, request: web.Request) -> None:
        if self._host not in LOOPBACK and not self._may_see(request):
            raise web.HTTPUnauthorized(reason="send the API key as X-API-Key")


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors are {"error": {"code", "message", "request_id"}}; a traceback goes to the log alone."""
    request_id, began = uuid.uuid4().hex, time.perf_counter()
    response = await _answered(request, handler, request_id)
    if response.status >= 400 and request.can_read_body and not request.content.at_eof():
        response.force_close()  # the rest of the body is not wanted
    counted(request, response.status, time.perf_counter() - began)
    return response


async def _answered(request: web.Request, handler: Handler, request_id: str) -> web.StreamResponse:
    try:
        return await handler(request)
    except (SessionError, RejectedError, InvalidImageError) as error:
        retry = getattr(error, "retry_seconds", None)
        headers = {} if retry is None else {"Retry-After": str(math.ceil(retry))}
        return _error(STATUS.get(error.code, 400), error.code, error.message, request_id, headers)
    except UnavailableError as error:
        log.warning("server.unavailable", **_place(request), request_id=request_id, reason=str(error))
        message = "Something that maskd needs does not answer; try again soon."
        return _error(503, "unavailable", message, request_id, {"Retry-After": "1"})
    except web.HTTPException as error:
        return _error(error.status, HTTPStatus(error.status).phrase.lower().replace(" ", "_"), error.reason, request_id)
    except Exception:
        log.exception("server.failed", **_place(request), request_id=request_id)
        return _error(500, "internal", "Something went wrong inside maskd; the log says what under this request id.", request_id)


def _place(request: web.Request) -> dict[str, str]:
    """What was asked for, without the id of a session, which opens it."""
    resource, session_id = request.match_info.route.resource, request.match_info.get("id")
    place = {"path": "(none)" if resource is None else resource.canonical}
    return place if session_id is None else place | {"session": hashed(session_id)}


def _name_of(request: web.Request) -> str:
    """The host that the request asks for, without its port."""
    host = request.headers.get("Host", "").lower()
    return host[1:].partition("]")[0] if host.startswith("[") else host.partition(":")[0]


async def _get_openapi(_request: web.Request) -> web.StreamResponse:
    return web.FileResponse(HERE / "openapi.json", headers={"Content-Type": "application/json"})


def _error(status: int, code: str, message: str, request_id: str, headers: Mapping[str, str] | None = None) -> web.Response:
    body = {"error": {"code": code, "message": message, "request_id": request_id}}
    return web.json_response(body, status=status, headers=headers)
