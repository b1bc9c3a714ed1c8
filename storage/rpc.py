"""Calls of public.maskd_… by PostgREST, with a project's URL and service key alone: time-outs, bounds, what an answer means.

Enters: SUPABASE_URL and a service key. Leaves: answers that were read, or the errors of `storage.base`. A call is asked once more
when its connection breaks: all of them bear a replay. Neither key nor body stands in an error.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import httpx
import orjson
from postgrest import APIError
from supabase import AsyncClient, AsyncClientOptions, acreate_client

from storage.base import ConfigurationError, RefusedError, UnavailableError, UnknownFunctionError

CONNECT_SECONDS_MAX = 5.0
CLOSE_SECONDS_MAX = 2.0
CONNECTIONS_MAX = 8
KEEP_SECONDS = 75.0
"""An idle connection stays open for so long: longer than the longest pause between calls, since opening one over TLS costs more
bytes than ten calls."""
REPLY_BYTES_MAX = 64 * 1024 * 1024
SENTENCE_CHARACTERS_MAX = 500
UNKNOWN_FUNCTION = "PGRST202"
REFUSED = ("28", "3D", "3F", "42501", "42883", "PGRST106", "PGRST3")  # authorization, schema, grant, function; PGRST3: tokens
PASSING = ("PGRST00", "08", "25", "40", "53", "55", "57", "58", "XX")  # PGRST00: it cannot reach its database or its cache
BROKEN = (httpx.NetworkError, httpx.RemoteProtocolError)  # a connection that had gone stale, for one: asked again once
UNREADABLE = (ValueError, TypeError, KeyError, AttributeError, IndexError)
Answer = TypeVar("Answer")


def translate(status: int, code: str, message: str) -> Exception:
    """What an answer that is no success means to the rest of maskd: by PostgREST's or Postgres' code, else by the HTTP status."""
    sentence = f"Supabase answered {status} {code}: {message}"[:SENTENCE_CHARACTERS_MAX]
    if code == UNKNOWN_FUNCTION:
        return UnknownFunctionError(
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


class Rpc:
    """One HTTP client, made by `open`; a lost connection is replaced by the next call."""

    def __init__(self, url: str, key: str, timeout_seconds: float) -> None:
        self._url = url.rstrip("/")
        self._key = key
        self._timeout = timeout_seconds
        self._http: httpx.AsyncClient | None = None
        self._client: AsyncClient | None = None

    async def open(self) -> None:
        """Make the client; ConfigurationError when address or key cannot be ones."""
        self._http = httpx.AsyncClient(
            http2=False,
            timeout=httpx.Timeout(self._timeout, connect=min(CONNECT_SECONDS_MAX, self._timeout)),
            limits=httpx.Limits(
                max_connections=CONNECTIONS_MAX, max_keepalive_connections=CONNECTIONS_MAX, keepalive_expiry=KEEP_SECONDS
            ),
            headers={"user-agent": "maskd", "accept-encoding": "identity"},  # replies are small, or bounded as they come
            event_hooks={"request": [_lighten], "response": [self._check]},
        )
        options = AsyncClientOptions(auto_refresh_token=False, persist_session=False, httpx_client=self._http)
        try:
            self._client = await acreate_client(self._url, self._key, options)
        except Exception as error:  # it looks at the form of its arguments only, and may quote them
            raise ConfigurationError("SUPABASE_URL or SUPABASE_SERVICE_KEY is not understood") from error

    async def close(self) -> None:
        """Drop the connections, whether or not the server takes notice."""
        http, self._http, self._client = self._http, None, None
        if http is not None:
            try:
                async with asyncio.timeout(CLOSE_SECONDS_MAX):
                    await http.aclose()
            except TimeoutError:
                return

    async def call(self, function: str, read: Callable[[Any], Answer], **arguments: Any) -> Answer:
        """What `read` makes of the answer of public.maskd_<function>, within the time-out. An answer that it cannot read is the
        fault of the server, or of a proxy before it: asking again may help."""
        answer = await self._ask(function, arguments)
        try:
            return read(answer)
        except UNREADABLE as error:
            raise UnavailableError(f"Supabase's answer to maskd_{function} is not understood ({type(error).__name__})") from None

    async def _ask(self, function: str, arguments: dict[str, Any]) -> Any:
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
        """Raises for whatever is no JSON of a success; postgrest's own error would not tell the status, and takes an answer that
        was cut off for a text."""
        response.stream = _Bounded(response.stream)
        await response.aread()
        if response.is_success:
            if not response.headers.get("content-type", "").startswith("application/json"):
                raise UnavailableError("Supabase's answer is not understood (no JSON)")
            try:
                orjson.loads(response.content)
            except ValueError:
                raise UnavailableError("Supabase's answer is not understood (JSON that was cut off)") from None
            return
        try:
            body = json.loads(response.content)
            code, message = str(body.get("code") or ""), str(body.get("message") or body.get("error") or response.reason_phrase)
        except (ValueError, AttributeError):
            code, message = "", response.reason_phrase
        raise translate(response.status_code, code, message.replace(self._key, "***"))


class _Bounded(httpx.AsyncByteStream):
    """A reply's bytes as they come, up to the bound."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > REPLY_BYTES_MAX:
                raise UnavailableError(f"Supabase's answer is larger than {REPLY_BYTES_MAX} bytes")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


async def _lighten(request: httpx.Request) -> None:
    """Without what nobody reads: an idle daemon's traffic is mostly headers."""
    for name in ("x-client-info", "accept-profile"):
        request.headers.pop(name, None)
