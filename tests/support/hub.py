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
    """What it holds by path, and what it was asked. `breaks_after` ends each answer after so many bytes."""

    files: dict[str, bytes] = field(default_factory=dict)
    address: str = ""
    status: int = 200
    error_code: str = ""
    breaks_after: int | None = None
    takes_ranges: bool = True
    announced: str | None = None
    ranges: list[str | None] = field(default_factory=list)
    tokens: set[str | None] = field(default_factory=set)


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
            held.tokens.add(self.headers.get("Authorization"))
            data = held.files.get(self.path.rpartition("/")[2])
            status = held.status if data is not None else 404
            body = data if status == 200 and data is not None else b""
            asked = self.headers.get("Range") if held.takes_ranges else None
            first = int((asked or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if status == 200 and first else status)
            if held.error_code:
                self.send_header("X-Error-Code", held.error_code)
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
