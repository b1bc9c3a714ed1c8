"""The Edge's example as processes: its Worker in workerd before a bucket, and supabase-js as an app has it; both in Node."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
from support.tokens import JWT_SECRET, PUBLISHABLE_KEY, SERVICE_KEY

FOLDER = Path(__file__).resolve().parents[1] / "edge"
NODE = shutil.which("node") or ""
ANSWER_SECONDS_MAX = 30.0
WHY_NOT = (
    "there is no node in PATH"
    if not NODE
    else "tests/edge/node_modules is missing; run: npm --prefix tests/edge install"
    if not (FOLDER / "node_modules" / "miniflare").exists()
    else ""
)


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer of the Worker."""

    status: int
    raw: bytes
    headers: Mapping[str, str]

    @property
    def envelope(self) -> dict[str, Any]:
        found = dict(json.loads(self.raw))
        assert set(found) == {"success", "data", "error", "meta"}
        assert set(found["meta"]) == {"request_id", "timestamp"}
        assert found["success"] is (self.status < 400) is (found["error"] is None)
        return found

    @property
    def data(self) -> Any:
        """What a success brought."""
        assert self.status < 300, self.raw
        return self.envelope["data"]

    @property
    def refusal(self) -> tuple[int, str]:
        """Status and code of an error."""
        error = self.envelope["error"]
        assert error["message"].endswith(".") or "?" in error["message"], error
        return self.status, error["code"]


class Edge:
    """The running Worker. No answer may hold a secret, whatever was asked."""

    def __init__(self, url: str, s3: str, secrets: tuple[str, ...]) -> None:
        self.s3 = s3
        self.host, self.port = urlsplit(url).hostname or "", urlsplit(url).port or 0
        self.secrets = (SERVICE_KEY, JWT_SECRET.decode(), *secrets)
        self._client = httpx.Client(base_url=f"{url}/api/v1", timeout=ANSWER_SECONDS_MAX)

    def ask(self, method: str, path: str, token: str = "", **more: Any) -> Reply:
        """One request; `more` is httpx's: json, content, files, headers, params."""
        headers = {**({"Authorization": f"Bearer {token}"} if token else {}), **more.pop("headers", {})}
        answer = self._client.request(method, path, headers=headers, **more)
        said = answer.content + str(answer.headers).encode()
        told = [secret for secret in (*self.secrets, token) if secret and secret.encode() in said]
        assert told == [], f"{method} {path} tells {told}"
        return Reply(answer.status_code, answer.content, answer.headers)

    def close(self) -> None:
        self._client.close()


@contextmanager
def edge(supabase_url: str, log: Path, *secrets: str, **variables: str) -> Iterator[Edge]:
    """The Worker, with `variables` beside those that it must have. Neither answers nor log may hold a secret."""
    needed = {"SUPABASE_URL": supabase_url, "SUPABASE_ANON_KEY": PUBLISHABLE_KEY}
    with _lines("runner.mjs", log, EDGE_VARS=json.dumps({**needed, **variables})) as (_, lines):
        at = lines.get(timeout=60)
        assert at, log.read_text()
        found = Edge(at["url"], at["s3"], secrets)
        try:
            yield found
        finally:
            found.close()
    assert [secret for secret in found.secrets if secret in log.read_text()] == []


class SupabaseJs:
    """The real library in a process of its own, with one user's token."""

    def __init__(self, process: subprocess.Popen[str], lines: queue.Queue[Any]) -> None:
        self._process = process
        self._lines = lines
        self._kept: list[dict[str, Any]] = []

    def ask(self, *calls: Any) -> dict[str, Any]:
        """What comes of a chain of calls: data, error, status, count."""
        self.say(calls)
        return dict(self.next("reply"))

    def say(self, line: Any) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(line) + "\n")
        self._process.stdin.flush()

    def next(self, name: str) -> Any:
        """The next `reply`, `state`, `system` or `change`; what comes before it is kept."""
        while not any(name in line for line in self._kept):
            line = self._lines.get(timeout=ANSWER_SECONDS_MAX)
            assert line is not None, "supabase-js has ended"
            self._kept.append(line)
        return self._kept.pop(next(place for place, line in enumerate(self._kept) if name in line))[name]


@contextmanager
def supabase_js(url: str, token: str, log: Path) -> Iterator[SupabaseJs]:
    settings = {"SUPABASE_URL": url, "SUPABASE_ANON_KEY": PUBLISHABLE_KEY, "TOKEN": token}
    with _lines("client.mjs", log, **settings) as (process, lines):
        yield SupabaseJs(process, lines)


@contextmanager
def _lines(program: str, log: Path, **settings: str) -> Iterator[tuple[subprocess.Popen[str], queue.Queue[Any]]]:
    """A Node program that answers in lines of JSON (None: it has ended), until its standard input ends."""
    lines: queue.Queue[Any] = queue.Queue()
    with log.open("a") as errors:
        process = subprocess.Popen(
            [NODE, program], cwd=FOLDER, env={"PATH": str(Path(NODE).parent), **settings}, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors,
        )  # fmt: skip
    assert process.stdin is not None

    def read() -> None:
        assert process.stdout is not None
        with process.stdout:
            for line in process.stdout:
                lines.put(json.loads(line))
        lines.put(None)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        yield process, lines
    finally:
        process.stdin.close()
        try:
            process.wait(15)
        finally:
            process.kill()
            process.wait(15)
        reader.join(15)
