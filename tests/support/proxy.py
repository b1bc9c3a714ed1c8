"""A TCP proxy before Postgres that misbehaves at the flick of a switch: it loses replies, refuses, or swallows everything.

It runs in threads of the test's process and reads just enough of the protocol to know which statement is being executed.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

SSL_REQUEST, GSS_REQUEST = 80877103, 80877104
CHUNK_BYTES = 1 << 16


class TcpProxy:
    """The switch. `port` is where to connect; what is not switched is forwarded."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._lock = threading.Lock()
        self._links: set[_Link] = set()
        self._needle = b""
        self._cuts_left = 0
        self._refusing = False
        self._swallowing = False
        self.cuts = 0
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def lose_replies(self, needle: str, times: int) -> None:
        """The next `times` statements whose text holds `needle` are executed and committed, but the connection ends before the
        reply comes back; `cuts` counts them."""
        with self._lock:
            self._needle, self._cuts_left = needle.encode(), times

    def refuse(self) -> None:
        """End every connection, and every new one at once, until `clear`."""
        with self._lock:
            self._refusing = True
        self.cut()

    def swallow(self) -> None:
        """Every byte vanishes, either way, without any connection ending, until `clear`; connections of that time stay dead."""
        with self._lock:
            self._swallowing = True
            for link in self._links:
                link.dead = True

    def clear(self) -> None:
        """New connections are forwarded again."""
        with self._lock:
            self._refusing = self._swallowing = False
            self._cuts_left = 0

    def cut(self) -> None:
        """End every connection that is open now."""
        with self._lock:
            links = list(self._links)
        for link in links:
            link.end()

    def close(self) -> None:
        self._listener.close()
        self.cut()

    def wants_cut(self, statement: bytes) -> bool:
        """Whether the reply to this statement is to be lost; each yes counts."""
        with self._lock:
            if self._cuts_left == 0 or self._needle not in statement:
                return False
            self._cuts_left -= 1
            return True

    def forget(self, link: _Link) -> None:
        with self._lock:
            self._links.discard(link)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                refusing, swallowing = self._refusing, self._swallowing
            if refusing:
                client.close()
                continue
            try:
                server = socket.create_connection(self._upstream, 10)
            except OSError:  # the server is down: so is its proxy
                client.close()
                continue
            server.settimeout(None)
            link = _Link(self, client, server, swallowing)
            with self._lock:
                self._links.add(link)
            threading.Thread(target=link.to_server, daemon=True).start()
            threading.Thread(target=link.to_client, daemon=True).start()


class _Link:
    """One connection and its two threads."""

    def __init__(self, proxy: TcpProxy, client: socket.socket, server: socket.socket, dead: bool) -> None:
        self._proxy = proxy
        self._client = client
        self._server = server
        self.dead = dead
        self._doomed = threading.Event()
        self._requests = _Requests()
        self._reply = b""

    def to_server(self) -> None:
        """Forward requests; one that meets the needle dooms the connection."""
        with suppress(OSError):
            while data := self._client.recv(CHUNK_BYTES):
                if self.dead:
                    continue
                for statement in self._requests.executed(data):
                    if self._proxy.wants_cut(statement):
                        self._doomed.set()
                self._server.sendall(data)
        self.end()

    def to_client(self) -> None:
        """Forward replies; that to a doomed request is read to its end, when all is committed, and lost."""
        with suppress(OSError):
            while data := self._server.recv(CHUNK_BYTES):
                if self.dead:
                    continue
                if not self._doomed.is_set():
                    self._client.sendall(data)
                    continue
                self._reply += data
                if _is_complete(self._reply):
                    self._proxy.cuts += 1
                    break
        self.end()

    def end(self) -> None:
        for each in (self._client, self._server):
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._proxy.forget(self)


class _Requests:
    """What a client sends, read for the statements that it executes: simple ones, and prepared ones by their name."""

    def __init__(self) -> None:
        self._rest = b""
        self._started = False
        self._prepared: dict[bytes, bytes] = {}

    def executed(self, data: bytes) -> list[bytes]:
        self._rest += data
        found = []
        while (message := self._next()) is not None:
            kind, body = message
            if kind == b"P":
                name, text = body.split(b"\0", 2)[:2]
                self._prepared[name] = text
            elif kind == b"B":
                found.append(self._prepared.get(body.split(b"\0", 2)[1], b""))
            elif kind == b"Q":
                found.append(body)
        return found

    def _next(self) -> tuple[bytes, bytes] | None:
        head = 1 if self._started else 0  # what comes before the start-up message is done has no type
        if len(self._rest) < head + 4:
            return None
        (length,) = struct.unpack_from("!i", self._rest, head)
        if len(self._rest) < head + length:
            return None
        kind, body = self._rest[:head], self._rest[head + 4 : head + length]
        self._rest = self._rest[head + length :]
        if not self._started:
            self._started = struct.unpack_from("!i", body)[0] not in (SSL_REQUEST, GSS_REQUEST)
        return kind, body


def _is_complete(reply: bytes) -> bool:
    """Whether the server's messages, from a boundary on, reach its ReadyForQuery."""
    at = 0
    while at + 5 <= len(reply):
        kind, length = reply[at : at + 1], struct.unpack_from("!i", reply, at + 1)[0]
        at += 1 + length
        if kind == b"Z" and at <= len(reply):
            return True
    return False


@contextmanager
def tcp_proxy(host: str, port: int) -> Iterator[TcpProxy]:
    """A proxy before `host:port`, closed at the end."""
    proxy = TcpProxy(host, port)
    try:
        yield proxy
    finally:
        proxy.close()
