"""A reverse proxy on the loopback address that misbehaves at the flick of a switch, to stand before an HTTP server.

It runs in threads of the test's process; whoever connects, a thread or a daemon in a process of its own, meets the same faults.
"""

from __future__ import annotations

import http.client
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

_NOT_FORWARDED = frozenset({"connection", "keep-alive", "transfer-encoding", "host"})
_UPSTREAM_SECONDS = 30


class _Act(Enum):
    ANSWER = "answer"
    TRUNCATE = "truncate"
    RESET = "reset"
    DELAY = "delay"


@dataclass(frozen=True, slots=True)
class _Fault:
    act: _Act
    times: int | None
    method: str | None
    status: int = 0
    seconds: float = 0.0


class FaultProxy:
    """The switch and the counters. One fault holds at a time.

    Each holds for `times` requests (None: until `clear`) of one `method` (None: of any).
    """

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._lock = threading.Lock()
        self._fault: _Fault | None = None
        self._left: int | None = None
        self._released = threading.Event()
        self._arrived = threading.Condition(self._lock)
        self._methods: list[str] = []

    def answer(self, status: int, times: int | None = None, method: str | None = None) -> None:
        """Answer with an S3 error of that HTTP status, upstream unasked."""
        self._set(_Fault(_Act.ANSWER, times, method, status=status))

    def truncate(self, times: int | None = None, method: str | None = "GET") -> None:
        """Send the whole Content-Length but half the body, then close."""
        self._set(_Fault(_Act.TRUNCATE, times, method))

    def reset(self, times: int | None = None, method: str | None = None) -> None:
        """Reset the connection (RST) instead of answering, upstream unasked."""
        self._set(_Fault(_Act.RESET, times, method))

    def delay(self, seconds: float, times: int | None = None, method: str | None = None) -> None:
        """Hold the request for `seconds`, or until the next switch, and then forward it."""
        self._set(_Fault(_Act.DELAY, times, method, seconds=seconds))

    def clear(self) -> None:
        """Behave again, and let go of every request that is held."""
        self._set(None)

    def requests(self, method: str | None = None) -> int:
        """Requests that came in so far, faulty ones included."""
        with self._lock:
            return len(self._methods) if method is None else self._methods.count(method)

    def wait_for_requests(self, count: int, seconds: float = 10.0) -> None:
        """Block until `count` requests came in altogether. Raises TimeoutError."""
        with self._arrived:
            if not self._arrived.wait_for(lambda: len(self._methods) >= count, seconds):
                raise TimeoutError(f"{len(self._methods)} of {count} requests came in {seconds} s")

    def _set(self, fault: _Fault | None) -> None:
        with self._lock:
            self._released.set()
            self._released = threading.Event()
            self._fault, self._left = fault, fault.times if fault else None

    def meet(self, method: str) -> tuple[_Fault | None, threading.Event]:
        """Count a request; the fault that it meets, and the event that ends its being held."""
        with self._arrived:
            self._methods.append(method)
            self._arrived.notify_all()
            fault = self._fault
            if fault is None or fault.method not in (None, method) or self._left == 0:
                return None, self._released
            if self._left is not None:
                self._left -= 1
            return fault, self._released


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients that hang up are what the faults are about."""


@contextmanager
def fault_proxy(upstream: str) -> Iterator[FaultProxy]:
    """Start a proxy in front of the http:// address `upstream`, on a free port, and stop it at the end."""
    server = _Server(("127.0.0.1", 0), BaseHTTPRequestHandler)
    proxy = FaultProxy(f"http://127.0.0.1:{server.server_address[1]}")
    server.RequestHandlerClass = _handler(proxy, upstream)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.clear()
        server.shutdown()
        server.server_close()
        thread.join()


def _handler(proxy: FaultProxy, upstream: str) -> type[BaseHTTPRequestHandler]:
    address = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_one_request(self) -> None:
            self.raw_requestline = self.rfile.readline(65537)
            if not self.raw_requestline or not self.parse_request():
                self.close_connection = True
                return
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            fault, released = proxy.meet(self.command)
            _respond(self, fault, released, body, address)
            self.wfile.flush()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Keep the test's output clean."""

    return Handler


def _respond(handler: BaseHTTPRequestHandler, fault: _Fault | None, released: threading.Event, body: bytes, address: str) -> None:
    act = fault.act if fault else None
    if fault and act is _Act.RESET:
        _reset(handler)
        return
    if fault and act is _Act.ANSWER:
        _send(handler, fault.status, [("Content-Type", "application/xml")], _error_body(fault.status))
        return
    if fault and act is _Act.DELAY:
        released.wait(fault.seconds)
    status, headers, answer = _forward(handler, body, address)
    if act is _Act.TRUNCATE:
        headers = [*headers, ("Content-Length", str(len(answer)))]
        answer = answer[: len(answer) // 2]
        handler.close_connection = True
    _send(handler, status, headers, answer)


def _forward(handler: BaseHTTPRequestHandler, body: bytes, address: str) -> tuple[int, list[tuple[str, str]], bytes]:
    connection = http.client.HTTPConnection(address, timeout=_UPSTREAM_SECONDS)
    try:
        headers = {name: value for name, value in handler.headers.items() if name.lower() not in _NOT_FORWARDED}
        connection.request(handler.command, handler.path, body or None, headers)
        reply = connection.getresponse()
        kept = [(name, value) for name, value in reply.getheaders() if name.lower() not in _NOT_FORWARDED]
        return reply.status, kept, reply.read()
    finally:
        connection.close()


def _send(handler: BaseHTTPRequestHandler, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
    handler.send_response_only(status)
    if not any(name.lower() == "content-length" for name, _ in headers):
        headers = [*headers, ("Content-Length", str(len(body)))]
    for name, value in {name.lower(): value for name, value in headers}.items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def _error_body(status: int) -> bytes:
    codes = {401: "Unauthorized", 403: "AccessDenied", 429: "TooManyRequests", 500: "InternalError", 503: "ServiceUnavailable"}
    code = codes.get(status, "Error")
    return f'<?xml version="1.0" encoding="UTF-8"?><Error><Code>{code}</Code><Message>injected</Message></Error>'.encode()


def _reset(handler: BaseHTTPRequestHandler) -> None:
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.rfile.close()  # it holds the socket open; closing it in time is what makes this RST and not FIN
    handler.connection.close()
    handler.close_connection = True
