"""Sessions over HTTP: bodies in, bounded while they come, JSON out. Transport only; what it means is `sessions.py`.

Who may create a session shows the key or a ticket; what follows needs only the session's id.
"""

from __future__ import annotations

import asyncio
import hmac
import re
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

from aiohttp import BodyPartReader, MultipartReader, StreamReader, web

from daemon import metrics
from daemon.fetch import params_of
from daemon.session_bodies import ImageBody, prompt_body
from daemon.session_everything import Everything
from daemon.sessions import Facts, SessionError, Sessions, busy
from daemon.tickets import is_good
from handlers._params import read
from handlers.base import RejectedError
from models.base import Role
from storage.base import InvalidImageError
from storage.blobs import too_large

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Read = TypeVar("Read")
Reply = Callable[[web.Request], Awaitable[web.Response]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
JSON_BYTES_MAX = 1_000_000
FRAME_BYTES = 100_000
"""What a multipart body may have around its file."""
PARTS_MAX = 10
CHUNK_BYTES = 1 << 16
LINES_AT_ONCE = 100
UPLOAD_SECONDS_MAX = 120
BODY_SECONDS_MAX = 30
BODIES_MAX = 64
"""Of JSON that may be on their way in at once."""
IN_THREAD_BYTES = 1 << 16
"""Longer JSON is read and validated beside the event loop."""
SESSION_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
PREFLIGHT = {
    "Access-Control-Allow-Methods": "GET, POST, DELETE",
    "Access-Control-Allow-Headers": "Content-Type, X-API-Key, X-Ticket",
    "Access-Control-Max-Age": "600",
}


@dataclass(frozen=True, slots=True)
class Access:
    """The key, if there is one, and the origins whose pages may ask for sessions."""

    api_key: str | None
    origins: frozenset[str] = frozenset()
    clock: Callable[[], float] = time.time

    def has_key(self, request: web.Request) -> bool:
        """Whether the request shows the key, as X-API-Key or, what Prometheus can send, as a bearer's."""
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = request.headers.get("X-API-Key", token if scheme == "Bearer" else "").encode("utf-8", "surrogateescape")
        return self.api_key is not None and hmac.compare_digest(given, self.api_key.encode())

    def has_ticket(self, request: web.Request) -> bool:
        """Whether the request shows a ticket made with the key."""
        return self.api_key is not None and is_good(request.headers.get("X-Ticket", ""), self.api_key, self.clock())

    def allows(self, origin: str) -> bool:
        """Whether pages of that origin may read answers."""
        return origin.lower() in self.origins


class SessionRoutes:
    """The routes /session…, and who may ask."""

    def __init__(self, sessions: Sessions, everything: Everything, access: Access) -> None:
        self._sessions = sessions
        self._everything = everything
        self._access = access
        self._bodies = 0

    def add_to(self, app: web.Application) -> None:
        """Every method and path of sessions; `openapi.json` says the same."""
        routes: tuple[tuple[str, str, Reply], ...] = (
            ("POST", "/session", self._create),
            ("DELETE", "/session", self._delete_all),
            ("GET", "/session/{id}", self._get),
            ("DELETE", "/session/{id}", self._delete),
            ("GET", "/session/{id}/embedding", self._embedding),
            ("POST", "/session/{id}/predict", self._predict),
            ("POST", "/session/{id}/everything", self._everything_of),
            ("GET", "/session/{id}/mask", self._mask),
            ("GET", "/session/{id}/masks", self._masks),
        )
        for method, path, reply in routes:
            app.router.add_route(method, path, reply)

    async def _create(self, request: web.Request) -> web.Response:
        began = time.perf_counter()
        if self._access.api_key is not None and not (self._access.has_key(request) or self._access.has_ticket(request)):
            raise SessionError("unauthorized", "Send the API key as X-API-Key, or a ticket as X-Ticket.")
        with self._sessions.uploading():
            described = await self._sessions.create(await self._image(request))
        return web.json_response(described | {"time_ms": _ms_since(began)})

    async def _image(self, request: web.Request) -> bytes:
        """The bytes of the image that a request brings or names."""
        try:
            async with asyncio.timeout(UPLOAD_SECONDS_MAX):
                if request.content_type == "application/json":
                    body = await self._json(request, lambda values: read(ImageBody, values))
                elif request.content_type == "multipart/form-data":
                    return await _file(request, self._sessions.limits.bytes_max)
                else:
                    raise RejectedError(
                        "params_invalid", "Send the image as multipart/form-data, or a JSON object that names it."
                    )
        except TimeoutError:
            raise SessionError("upload_timeout", f"The image did not arrive within {UPLOAD_SECONDS_MAX} seconds.") from None
        return await self._sessions.bring(str(body.project_id), body.image_url)

    async def _delete_all(self, request: web.Request) -> web.Response:
        if self._access.api_key is not None and not self._access.has_key(request):
            raise SessionError("unauthorized", "Send the API key as X-API-Key.")
        return web.json_response({"deleted": await self._sessions.drop_all()})

    async def _get(self, request: web.Request) -> web.Response:
        session_id = _id(request)
        described = await self._sessions.describe(session_id)
        return web.json_response(described | {"everything": await self._everything.status(session_id)})

    async def _delete(self, request: web.Request) -> web.Response:
        session_id = _id(request)
        await self._sessions.drop(session_id)
        self._everything.forget(session_id)
        return web.Response(status=204)

    async def _embedding(self, request: web.Request) -> web.Response:
        return web.Response(body=await self._sessions.embedding(_id(request)), content_type="application/octet-stream")

    async def _predict(self, request: web.Request) -> web.Response:
        began = time.perf_counter()
        session_id = _id(request)
        facts = await self._know(session_id, Role.VISUAL)
        body = await self._json(request, lambda values: prompt_body(values, self._sessions.limits.asks))
        found = await self._sessions.predict(session_id, body, facts)
        return web.json_response(found | {"time_ms": _ms_since(began)})

    async def _everything_of(self, request: web.Request) -> web.Response:
        session_id = _id(request)
        await self._know(session_id, Role.EVERYTHING)
        params = await self._json(request, lambda values: values, empty=b"{}")
        return web.json_response(await self._everything.start(session_id, params), status=202)

    async def _know(self, session_id: str, role: Role) -> Facts:
        """What the session is of: nothing is read for who has none here."""
        self._sessions.desk(role)
        return await self._sessions.facts(session_id)

    async def _json(self, request: web.Request, make: Callable[[Mapping[str, Any]], Read], empty: bytes = b"") -> Read:
        """What is made of a JSON object, which has to come in time."""
        with self._reading():
            try:
                async with asyncio.timeout(BODY_SECONDS_MAX):
                    data = await _bytes(request, JSON_BYTES_MAX) or empty
            except TimeoutError:
                raise SessionError("upload_timeout", f"The body did not arrive within {BODY_SECONDS_MAX} seconds.") from None
            if len(data) <= IN_THREAD_BYTES:
                return make(params_of(data))
            return await self._sessions.in_thread(lambda: make(params_of(data)))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """One of the bodies that come in at a time."""
        if self._bodies >= BODIES_MAX:
            raise busy()
        self._bodies += 1
        try:
            yield
        finally:
            self._bodies -= 1

    async def _mask(self, request: web.Request) -> web.Response:
        found = await self._everything.mask_at(_id(request), _number(request, "x"), _number(request, "y"))
        return web.json_response({"mask": found})

    async def _masks(self, request: web.Request) -> web.Response:
        return web.json_response(await self._everything.masks(_id(request)))


def counted(request: web.Request, status: int, seconds: float) -> None:
    """Note a request about sessions in the metrics; others are not counted."""
    route = request.match_info.route.resource
    if route is not None and route.canonical.startswith("/session"):
        label = f"{request.method} {route.canonical}"
        metrics.SESSION_REQUESTS.labels(label, str(status)).inc()
        metrics.SESSION_SECONDS.labels(label).observe(seconds)


def cross_origin(access: Access) -> Any:
    """A middleware that lets pages of the allowed origins ask for sessions and read the answers."""

    @web.middleware
    async def answer(request: web.Request, handler: Handler) -> web.StreamResponse:
        origin = request.headers.get("Origin")
        if origin is None or not request.path.startswith("/session"):
            return await handler(request)
        allowed = access.allows(origin)
        if request.method == "OPTIONS" and "Access-Control-Request-Method" in request.headers:
            response: web.StreamResponse = web.Response(status=204 if allowed else 403, headers=PREFLIGHT if allowed else {})
        else:
            response = await handler(request)
        response.headers["Vary"] = "Origin"
        if allowed:
            response.headers["Access-Control-Allow-Origin"] = origin
            response.headers["Access-Control-Expose-Headers"] = "Retry-After"
        return response

    return answer


def is_foreign(request: web.Request, access: Access) -> bool:
    """Whether a page that is neither this host's nor allowed has sent the request."""
    origin = request.headers.get("Origin")
    return origin is not None and not access.allows(origin) and _host_of(origin) not in LOOPBACK


def _host_of(origin: str) -> str | None:
    try:
        return urlsplit(origin).hostname
    except ValueError:
        return None


def _id(request: web.Request) -> str:
    session_id = request.match_info["id"]
    if SESSION_ID.fullmatch(session_id) is None:
        raise SessionError("session_unknown", "There is no such session: an id is a UUID in lower case.")
    return session_id


def _number(request: web.Request, name: str) -> float:
    try:
        value = float(request.query[name])
    except (KeyError, ValueError):
        raise RejectedError("params_invalid", "Say which pixel: ?x=…&y=…, two numbers.") from None
    if value != value:
        raise RejectedError("params_invalid", "Say which pixel: ?x=…&y=…, two numbers.")
    return value


async def _bytes(request: web.Request, bytes_max: int) -> bytes:
    """The body of a request of JSON, read no further than it may be long."""
    body = bytearray()
    async for chunk in request.content.iter_chunked(CHUNK_BYTES):
        body += chunk
        if len(body) > bytes_max:
            raise SessionError("body_too_large", f"The body may have {bytes_max} bytes.")
    return bytes(body)


async def _file(request: web.Request, bytes_max: int) -> bytes:
    """The field `file` of a multipart body, read no further than it may be long."""
    if (request.content_length or 0) > bytes_max + FRAME_BYTES:
        raise too_large(request.content_length or 0, bytes_max)
    try:
        return await _only_file(Framed(request.content), request, bytes_max)
    except (InvalidImageError, RejectedError, TimeoutError, OSError):
        raise
    except Exception as error:  # what the parser raises has no common parent
        raise RejectedError("params_invalid", "The multipart body cannot be read.") from error


class Framed:
    """The content of a multipart body, of which little may be anything but its file: boundaries, headers, other fields."""

    def __init__(self, content: StreamReader) -> None:
        self._content = content
        self._bytes = 0
        self._lines = 0
        self.file_bytes = 0

    async def read(self, most: int = -1) -> bytes:
        return self._seen(await self._content.read(most))

    async def readline(self, **options: Any) -> bytes:
        self._lines += 1
        if self._lines % LINES_AT_ONCE == 0:
            await asyncio.sleep(0)  # lines that are here already are read without a pause
        return self._seen(await self._content.readline(**options))

    def at_eof(self) -> bool:
        return self._content.at_eof()

    def unread_data(self, data: bytes) -> None:
        self._bytes -= len(data)
        self._content.unread_data(data)

    def check(self, ahead: int = 0) -> None:
        """Raise RejectedError when the frame is too long; `ahead` bytes may be the file's."""
        if self._bytes - self.file_bytes > FRAME_BYTES + ahead:
            raise RejectedError("params_invalid", f"The body has more than {FRAME_BYTES} bytes beside its file.")

    def _seen(self, data: bytes) -> bytes:
        self._bytes += len(data)
        self.check(ahead=4 * CHUNK_BYTES)
        return data


async def _only_file(framed: Framed, request: web.Request, bytes_max: int) -> bytes:
    content: Any = framed
    reader, parts, found = MultipartReader(request.headers, content), 0, None
    while (part := await reader.next()) is not None:
        parts += 1
        if parts > PARTS_MAX or not isinstance(part, BodyPartReader):
            raise RejectedError("params_invalid", f"The multipart body may have {PARTS_MAX} fields, one of them the file.")
        if part.name != "file":
            while await part.read_chunk(CHUNK_BYTES):
                framed.check(ahead=CHUNK_BYTES)
        elif found is not None:
            raise RejectedError("params_invalid", 'There are two fields called "file"; send one image.')
        else:
            found = await _part(part, framed, bytes_max)
        framed.check()
        await asyncio.sleep(0)
    if found is None:
        raise RejectedError("params_invalid", 'The multipart body needs one image, in a field called "file".')
    return found


async def _part(part: BodyPartReader, framed: Framed, bytes_max: int) -> bytes:
    body = bytearray()
    while chunk := await part.read_chunk(CHUNK_BYTES):
        body += chunk
        framed.file_bytes = len(body)
        if len(body) > bytes_max:
            raise too_large(len(body), bytes_max)
    return bytes(body)


def _ms_since(began: float) -> float:
    return round((time.perf_counter() - began) * 1000, 1)
