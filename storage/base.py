"""What the outside world is to maskd: values and protocols. Adapters implement them and know nothing of each other."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol


class UnavailableError(Exception):
    """A shared service (database, blob store) does not answer; nobody's task is to blame and trying again may help."""


class ConfigurationError(Exception):
    """A shared service refuses us: wrong key, missing grant, unknown schema. The message says what to mend."""


class SchemaError(ConfigurationError):
    """The database answers, but its schema is not ours yet, or not all of it; the message names the command that mends it."""


class UnknownFunctionError(SchemaError):
    """The functions of a migration are not known there: it has not run, or has run so lately that not everybody has noticed."""


class RefusedError(Exception):
    """The database does not take these values (a NUL, a number too large); without them the rest may pass."""


class MissingBlobError(Exception):
    """There is no blob under that key."""


class InvalidImageError(Exception):
    """The bytes are not an image that can be used; `code` is image_invalid or image_too_large, `message` one sentence."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


class BlobStore(Protocol):
    """Stored bytes by key. Blocking and thread-safe: called from worker threads. Every call has time-outs of its own.

    Raises UnavailableError (time-out, 429, 5xx, reset after the adapter's own retries), ConfigurationError (refused
    credentials, no such bucket), MissingBlobError.
    """

    def get(self, key: str, bytes_max: int) -> bytes:
        """The blob's bytes; InvalidImageError("image_too_large", …) when it is larger than `bytes_max`, before reading it all."""
        ...

    def put(self, key: str, data: bytes, content_type: str) -> None:
        """Store an immutable blob (cache header of a year). Storing the same key again with the same bytes is harmless."""
        ...

    def delete(self, keys: Sequence[str]) -> None:
        """Delete blobs; keys that do not exist are no error."""
        ...

    def list(self, prefix: str, limit: int) -> list[str]:
        """At most `limit` keys that begin with `prefix`, in order."""
        ...

    def probe(self) -> None:
        """One cheap round trip that proves the store answers and the credentials hold."""
        ...

    def describe(self) -> str:
        """Where blobs lie, and what is particular about it; no secret."""
        ...


@dataclass(slots=True, eq=False)  # one a task: freezing would cost more than all the rest of making it
class Task:
    """A claimed row: what it asks for, and the claim (`id`, `token`) that every write about it must name."""

    id: str
    token: str
    kind: str
    project_id: str
    user_id: str | None
    source_image_url: str | None
    text_prompt: str | None
    params: str
    """The row's params as JSON text; parsed by fetch."""
    attempts: int
    max_attempts: int
    deaths: int
    waited_seconds: float
    """From when the row became pending to the claim, by the database's clock."""


class Fate(StrEnum):
    """How work on a task ended."""

    DONE = "done"
    FAILED = "failed"
    RETRY = "retry"
    RELEASED = "released"
    SUSPECT = "suspect"
    """Its batch hung, and nobody knows by which of its tasks: it goes back, to run apart as if its worker had died."""


@dataclass(slots=True, eq=False)  # one a task: freezing would cost more than all the rest of making it
class Outcome:
    """What settle writes about one claim. `wrote` says that blobs under this claim's prefix may exist."""

    id: str
    token: str
    fate: Fate
    values: str = "{}"
    """For DONE, a JSON object: mask_image_url, masks_url, result_image_url, labels, metadata."""
    code: str | None = None
    message: str | None = None
    delay_seconds: float = 0.0
    wrote: bool = False


class Verdict(StrEnum):
    """Why an outcome was not written: it was before, or the claim is gone. Only LOST lets the owner delete its blobs."""

    ALREADY = "already"
    LOST = "lost"


@dataclass(frozen=True, slots=True)
class Claimed:
    """What a claim brought: tasks in the order to run them, when the next delayed row is due, whether suspects wait."""

    tasks: tuple[Task, ...]
    next_due_seconds: float | None = None
    suspects: bool = False


@dataclass(frozen=True, slots=True)
class Beat:
    """What a worker tells of itself: who it is, and the claims it holds, has begun, and has asked for."""

    worker: str
    lease_seconds: float
    info: Mapping[str, Any]
    kinds: Sequence[str]
    held: Sequence[tuple[str, str]] = ()
    begun_ids: Sequence[str] = ()
    open_tokens: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class Tombstone:
    """A prefix of blobs that nobody needs any more."""

    id: int
    prefix: str


@dataclass(frozen=True, slots=True)
class Tended:
    """What a worker that holds nothing learns by its one call: how many rows of dead workers went back, tombstones that are due,
    whether a claim would find work, and when the next worker that holds rows would be silent for its whole lease."""

    rescued: int
    tombstones: tuple[Tombstone, ...] = ()
    work: bool = False
    silent_seconds: float | None = None


class TaskStore(Protocol):
    """The queue. Every method is one call of a function in `migrations/`, safe to replay, with a time-out.

    Raises UnavailableError (no answer, or one that says to try again), ConfigurationError (refused, or no such schema),
    RefusedError (the database does not take these values).
    """

    async def open(self) -> None:
        """Connect, and check that the schema is one that this program knows; ConfigurationError says which command mends it."""
        ...

    async def close(self) -> None: ...

    async def claim(self, worker: str, token: str, kinds: Sequence[str], most: int) -> Claimed:
        """Take up to `most` tasks under `token`; asking again with one token gives the same tasks."""
        ...

    async def claim_suspects(self, worker: str, token: str, kinds: Sequence[str], most: int) -> Claimed:
        """Take rows whose worker died under them; the caller runs nothing else meanwhile."""
        ...

    async def settle(self, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Verdict]:
        """Write outcomes, each only if its claim still stands. Returns, by (id, token), why the others were not written."""
        ...

    async def beat(self, beat: Beat) -> list[tuple[str, str]]:
        """Say that the worker lives; returns the held (id, token)s that are no longer its own."""
        ...

    async def tend(
        self, worker: str, lease_seconds: float, unserved_seconds: float, most: int, ahead_seconds: float
    ) -> Tended | None:
        """In one call what a worker that holds nothing has to do: beat, rescue, ask for up to `most` tombstones, and look whether
        there is work now, or delayed work that is due within `ahead_seconds`. None: the worker is not known and has to beat."""
        ...

    async def rescue(self, worker: str, unserved_seconds: float) -> int:
        """Take back the rows of dead workers; how many."""
        ...

    async def bury(self, worker: str, begun_ids: Sequence[str]) -> int:
        """Take back the rows of a worker that is known to be dead; how many."""
        ...

    async def leave(self, worker: str) -> None:
        """Say that the worker stops in good order."""
        ...

    async def tombstones(self, most: int) -> list[Tombstone]: ...

    async def bury_tombstones(self, ids: Sequence[int]) -> None: ...

    async def masks_of(self, task_id: str, project_id: str) -> str | None:
        """`masks_url` of a finished task of the same project, else None."""
        ...

    async def owner_of(self, project_id: str) -> str | None:
        """The user of a project, None when there is no such project."""
        ...

    async def key_templates(self) -> list[str]:
        """Prefixes under which a task may name keys, with {user_id} and {project_id} to fill in."""
        ...

    async def status(self) -> dict[str, Any]:
        """The queue at a glance: tasks by kind and status, kinds, workers, last errors."""
        ...

    async def checkup(self) -> dict[str, Any]:
        """What the database finds of itself, as `maskd.checkup()` tells it: grants, triggers, indexes, policies and the like."""
        ...

    async def ask(self, function: str, **arguments: Any) -> Any:
        """What public.maskd_<function> answers an operator: JSON values and lists of text in, one JSON value out."""
        ...

    async def probe(self) -> None:
        """One cheap round trip."""
        ...


class SessionsFullError(Exception):
    """Live sessions fill their bound, in entries or in bytes; the first of them may be over in `retry_seconds`."""

    def __init__(self, retry_seconds: float) -> None:
        super().__init__()
        self.retry_seconds = retry_seconds


class SessionStore(Protocol):
    """Sessions as bytes: a few named parts each, gone when unused for a time, bounded in entries and in bytes.

    Raises UnavailableError (no answer in time), ConfigurationError (refused). Every call has a time-out.
    """

    name: str

    async def open(self) -> None:
        """Connect; ConfigurationError or UnavailableError where that fails."""
        ...

    async def close(self) -> None: ...

    async def create(self, session_id: str, parts: Mapping[str, bytes]) -> None:
        """A new session; SessionsFullError when there is no room for it."""
        ...

    async def read(self, session_id: str, part: str) -> bytes | None:
        """A part, None when there is none or no such session; the session lives on."""
        ...

    async def write(self, session_id: str, part: str, data: bytes) -> bool:
        """Add or replace a part; False when there is no such session. SessionsFullError when there is no room for it."""
        ...

    async def drop(self, session_id: str) -> bool:
        """End a session; whether there was one."""
        ...

    async def drop_all(self) -> int:
        """End them all; how many there were."""
        ...

    async def count(self) -> tuple[int, int]:
        """How many live, and their bytes; what is over goes."""
        ...


class WakeSource(Protocol):
    """Where hints come from that there may be work. A hint carries nothing; losing all of them costs latency only.

    `on_ended` hears why a subscription is over, one of `reasons`.
    """

    name: str
    reasons: tuple[str, ...]
    on_ended: Callable[[str], None]
    workers: int
    """How many live workers the same hints may wake, as of late; 1 where a source cannot know."""

    async def run(self, wake: Callable[[], None], proven: Callable[[bool], None]) -> None:
        """Run until cancelled. Calls `wake` on every hint and after every (re)subscription, `proven(True)` once the way is
        proven from end to end and `proven(False)` when that ends. Never raises for what the world does."""
        ...

    async def prove(self) -> None:
        """Once from connecting to the proof. Raises UnavailableError or ConfigurationError with what is in the way."""
        ...

    def polled(self, tasks: Sequence[Task]) -> int:
        """The poll found these tasks, and no hint had led to them: a source that names what it announces can tell it is deaf. How
        many of them it should have announced."""
        ...
