"""A TCP front before a Supabase stand-in or a Postgres: it counts every byte, and can let Realtime's connections alone misbehave.

What is Realtime's is told by the first bytes of a connection. It runs in threads of its own.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 1 << 16
REALTIME = b"GET /realtime/"
RESET = struct.pack("ii", 1, 0)
TLS_RECORD_BYTES = 22
"""What TLS 1.3 adds to each record: header, content type, tag."""


class Front:
    """`port` is where to connect; `counts` holds bytes by `realtime` and `rest`, `records` (what was sent in one piece) and
    `connections`."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self._lock = threading.Lock()
        self._realtime: set[_Pair] = set()
        self._refusing = False
        self._swallowing = False
        self.counts: Counter[str] = Counter()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port: int = self._listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def refuse(self) -> None:
        """Realtime is gone: its connections are reset, new ones too, until `clear`."""
        with self._lock:
            self._refusing = True
            pairs = list(self._realtime)
        for pair in pairs:
            pair.end()

    def swallow(self) -> None:
        """Every byte to and from Realtime vanishes, until `clear`; connections of that time stay dead."""
        with self._lock:
            self._swallowing = True
            for pair in self._realtime:
                pair.dead = True

    def clear(self) -> None:
        with self._lock:
            self._refusing = self._swallowing = False

    def close(self) -> None:
        self._listener.close()

    def add(self, what: str, size: int) -> None:
        with self._lock:
            self.counts[what] += size
            self.counts["records"] += 1

    def take_in(self, pair: _Pair) -> bool:
        """Whether a connection to Realtime is let through."""
        with self._lock:
            pair.dead = self._swallowing
            self._realtime.add(pair)
            return not self._refusing

    def forget(self, pair: _Pair) -> None:
        with self._lock:
            self._realtime.discard(pair)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with suppress(OSError):
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            is_realtime = client.recv(len(REALTIME), socket.MSG_PEEK) == REALTIME
            server = socket.create_connection(self._upstream, 10)
            server.settimeout(None)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            pair = _Pair(self, client, server, "realtime" if is_realtime else "rest")
            if is_realtime and not self.take_in(pair):
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
                pair.end()
                return
            with self._lock:
                self.counts["connections"] += 1
            threading.Thread(target=pair.forward, args=(server, client), daemon=True).start()
            pair.forward(client, server)


class _Pair:
    """One connection, forwarded by two threads."""

    def __init__(self, front: Front, client: socket.socket, server: socket.socket, what: str) -> None:
        self._front = front
        self._sockets = (client, server)
        self._what = what
        self.dead = False

    def forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                if not self.dead:
                    self._front.add(self._what, len(data))
                    sink.sendall(data)
        self.end()

    def end(self) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()
        self._front.forget(self)


@contextmanager
def front(host: str, port: int) -> Iterator[Front]:
    """A front before `host:port`."""
    made = Front(host, port)
    try:
        yield made
    finally:
        made.refuse()
        made.close()
