"""A hub for weights in this process: files with checksums, downloads that can be cut short, refusals."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(slots=True, eq=False)
class Hub:
    """What it holds by name, and what it was asked. `breaks_after` ends each answer after so many bytes; `gate` is the only token
    that is let in, if there is one."""

    files: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    status: int = 200
    error_code: str = ""
    gate: str | None = None
    breaks_after: int | None = None
    takes_ranges: bool = True
    announced: str | None = None
    ranges: list[str | None] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)

    def refusal(self, name: str, authorization: str | None) -> tuple[int, str] | None:
        """Status and code of the error that a request gets, as the real hub words them."""
        if self.status != 200:
            return self.status, self.error_code
        if self.gate is not None and authorization != f"Bearer {self.gate}":
            return 401 if authorization is None else 403, "GatedRepo"
        return None if name in self.files else (404, "EntryNotFound")


@contextmanager
def hub() -> Iterator[Hub]:
    """A hub on a free port."""
    held = Hub()

    class Answer(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            """Nothing: pytest shows what matters."""

        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_GET(self) -> None:
            held.ranges.append(self.headers.get("Range"))
            self._answer(None)

        def _answer(self, instead: bytes | None) -> None:
            authorization, name = self.headers.get("Authorization"), self.path.rpartition("/")[2]
            held.tokens.add(authorization)
            status, code = held.refusal(name, authorization) or (200, "")
            body = held.files[name] if status == 200 else b""
            asked = self.headers.get("Range") if held.takes_ranges else None
            first = int((asked or "bytes=0-").removeprefix("bytes=").partition("-")[0]) if body else 0
            self.send_response(206 if first else status)
            if code:
                self.send_header("X-Error-Code", code)
            if first:
                self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
            self.send_header("ETag", f'"{held.announced or hashlib.sha256(body).hexdigest()}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(body) - first))
            self.end_headers()
            if instead is None:
                end = len(body) if held.breaks_after is None else first + held.breaks_after
                self.wfile.write(body[first:end])
                self.close_connection = end < len(body)

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        held.address = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield held
        finally:
            server.shutdown()
            thread.join()
