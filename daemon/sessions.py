"""Sessions: an image that a person works on, embedded once and clicked many times. No HTTP in here.

Enters: bytes of images, prompts. Leaves: replies as JSON values, or a SessionError, RejectedError or InvalidImageError. What
lives longer than a call lies in the store; any daemon on the same store can go on with it.
"""

from __future__ import annotations

import io
import json
import math
import time
import uuid
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
import structlog

from daemon import metrics
from daemon.asks import BusyError, SupersededError
from daemon.infer import Pool
from daemon.lanes import Lane
from daemon.project_images import ProjectImages
from daemon.session_bodies import PredictBody, answers, prompt_of
from daemon.session_masks import SizeWH
from handlers.base import Limits
from models.base import Embedding, ImageHWC, Later, Model, Role, Stop, VisualQuestion
from storage import images
from storage.base import ConfigurationError, SessionsFullError, SessionStore, UnavailableError

log = structlog.get_logger(__name__)

SIDE = 1024
"""Of the source that is kept: what the networks look at is not larger."""
COUNT_EVERY_SECONDS = 10.0
BUSY_RETRY_SECONDS = 1
FACTS, SOURCE = "facts", "source"

Answer = TypeVar("Answer")


class SessionError(Exception):
    """Why a request got no answer; the client reads `code` and `message`, and may try again after `retry_seconds`."""

    def __init__(self, code: str, message: str, retry_seconds: int | None = None) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message
        self.retry_seconds = retry_seconds


@dataclass(frozen=True, slots=True)
class SessionLimits:
    """Ceilings of sessions; each is a setting, or follows from some."""

    bytes_max: int
    pixels_max: int
    ttl_seconds: float
    timeout_seconds: float
    everything_seconds: float
    waiting_max: int
    threads: int
    asks: Limits


@dataclass(frozen=True, slots=True)
class Desk:
    """Where a role's engine answers."""

    pool: Pool
    role: Role

    @property
    def model(self) -> Any:
        return self.pool.models.of(self.role)


@dataclass(frozen=True, slots=True)
class Facts:
    """What a session is of."""

    width: int
    height: int
    content_hash: str

    @property
    def size_wh(self) -> SizeWH:
        return self.width, self.height


class Sessions:
    """The sessions of one daemon. `open_to` gives it engines; until then every question is answered by `starting`."""

    def __init__(self, store: SessionStore, limits: SessionLimits, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.limits = limits
        self.available = True
        self.live = 0
        self.bytes = 0
        self._clock = clock
        self._desks: Mapping[Role, Desk] | None = None
        self._images: ProjectImages | None = None
        self._uploads = 0
        self._threads = anyio.CapacityLimiter(limits.threads)

    def open_to(self, desks: Mapping[Role, Desk], project_images: ProjectImages | None) -> None:
        """From now on questions are answered at these desks."""
        self._desks, self._images = desks, project_images

    async def run(self) -> None:
        """Count what lives, now and then, so that what is over leaves the memory; until cancelled."""
        while True:
            try:
                self.live, self.bytes = await self.store.count()
                self.available = True
            except (UnavailableError, ConfigurationError) as error:
                self.available = False
                log.warning("sessions.uncounted", reason=str(error))
            metrics.SESSIONS_LIVE.set(self.live)
            metrics.SESSION_BYTES.set(self.bytes)
            await anyio.sleep(COUNT_EVERY_SECONDS)

    def health(self) -> dict[str, Any]:
        """What /health tells: where sessions live, whether that answers, and what lived there when it was last counted."""
        return {"store": self.store.name, "available": self.available, "live": self.live, "bytes": self.bytes}

    def desk(self, role: Role) -> Desk:
        """Who answers for a role; SessionError where nobody does (yet)."""
        if self._desks is None:
            raise SessionError("starting", "The models are still being loaded; try again soon.", BUSY_RETRY_SECONDS)
        if role not in self._desks:
            raise SessionError("engine_unavailable", f"No engine of this daemon does {role}.")
        return self._desks[role]

    @contextmanager
    def uploading(self) -> Iterator[None]:
        """One of the images that come in at a time: so many bodies of `bytes_max` may be in memory."""
        if self._uploads >= self.limits.waiting_max:
            raise busy()
        self._uploads += 1
        try:
            yield
        finally:
            self._uploads -= 1

    async def bring(self, project_id: str, address: str) -> bytes:
        """The image of a project; raises RejectedError."""
        self.desk(Role.VISUAL)
        assert self._images is not None, "desks and images come together"
        return await self._images.bring(project_id, address, self.limits.bytes_max)

    async def create(self, data: bytes) -> dict[str, Any]:
        """A new session of an image, embedded. Raises InvalidImageError, SessionError."""
        desk = self.desk(Role.VISUAL)
        facts, small_hwc, source = await self.in_thread(lambda: _decoded(data, self.limits))
        session_id = str(uuid.uuid4())
        try:
            await self.store.create(session_id, {FACTS: json.dumps(asdict(facts)).encode(), SOURCE: source})
        except SessionsFullError as error:
            raise _full(error) from None
        try:
            _, cached = await self.embedding_of(desk, session_id, facts, small_hwc)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self.store.drop(session_id)
            raise
        metrics.SESSIONS_CREATED.inc()
        return self._described(session_id, facts, desk.model) | {"embedding_cached": cached}

    async def describe(self, session_id: str) -> dict[str, Any]:
        """What the session is of, and until when it lives unused."""
        facts = await self.facts(session_id)
        return self._described(session_id, facts, self.desk(Role.VISUAL).model)

    async def drop(self, session_id: str) -> None:
        """End it, and forget its image."""
        facts = await self.facts(session_id)
        if not await self.store.drop(session_id):
            raise unknown()
        self.desk(Role.VISUAL).pool.models.embeddings.discard(facts.content_hash)

    async def drop_all(self) -> int:
        """End them all; how many there were."""
        return await self.store.drop_all()

    async def predict(self, session_id: str, body: PredictBody, facts: Facts) -> dict[str, Any]:
        """The masks that a prompt means, best first, in the image of those facts. Raises RejectedError, SessionError."""
        desk = self.desk(Role.VISUAL)
        key = None if body.supersede is None else (session_id, body.supersede)
        with desk.pool.arrived(key) as number:
            return await self._predicted(desk, session_id, body, facts, key, number)

    async def _predicted(
        self, desk: Desk, session_id: str, body: PredictBody, facts: Facts, key: Hashable, number: int
    ) -> dict[str, Any]:
        make = partial(prompt_of, body, facts.size_wh)
        prompt = make() if body.mask is None else await self.in_thread(make)
        bring = await self.bringing(desk, session_id, facts)

        def look(stop: Stop) -> tuple[Later, bool]:
            embedding, cached = bring()
            stop()
            (later,) = desk.model.segment([VisualQuestion(embedding, prompt, body.multimask)], stop)
            return later, cached

        later, cached = await self.ask(desk, look, key=key, number=number)
        masks = await self.in_thread(lambda: answers(later(), facts.size_wh, body.format))
        return {"masks": masks, "engine": desk.model.engine, "model_id": desk.model.model_id, "embedding_cached": cached}

    async def embedding(self, session_id: str) -> bytes:
        """What the engine sees in the image, as a .npy file of float32; SessionError where that is not one array."""
        desk = self.desk(Role.VISUAL)
        facts = await self.facts(session_id)
        embedding, _ = await self.embedding_of(desk, session_id, facts)
        if not isinstance(embedding.data, np.ndarray):
            raise SessionError("embedding_unavailable", f"What {desk.model.engine} sees in an image is not one array.")
        return await self.in_thread(lambda: _npy(embedding.data))

    async def facts(self, session_id: str) -> Facts:
        """What a session is of, which counts as a use; SessionError when there is none (any more)."""
        data = await self.store.read(session_id, FACTS)
        if data is None:
            raise unknown()
        return _facts(data)

    async def embedding_of(
        self, desk: Desk, session_id: str, facts: Facts, small_hwc: ImageHWC | None = None
    ) -> tuple[Embedding, bool]:
        """The embedding, and whether it was there; else it is computed of the source (`small_hwc` where it is at hand)."""
        bring = await self.bringing(desk, session_id, facts, small_hwc)
        return await self.ask(desk, lambda stop: bring())

    async def bringing(
        self, desk: Desk, session_id: str, facts: Facts, small_hwc: ImageHWC | None = None
    ) -> Callable[[], tuple[Embedding, bool]]:
        """The same as a call for the pool's thread: what it needs is at hand."""
        embeddings = desk.pool.models.embeddings
        kept = embeddings.kept(desk.model, facts.content_hash)
        if kept is not None:
            return lambda: (kept, True)
        if small_hwc is None:
            source = await self.store.read(session_id, SOURCE)
            if source is None:
                raise unknown()
            try:
                small_hwc = await self.in_thread(lambda: images.unkept(source))
            except ValueError:
                raise unknown() from None
        pixels_hwc, size_hw = small_hwc, (facts.height, facts.width)

        def bring() -> tuple[Embedding, bool]:
            view = embeddings.view(desk.model, facts.content_hash, pixels_hwc, size_hw)
            return embeddings.get(desk.model, [view], of_session=True)[0]

        return bring

    async def ask(
        self,
        desk: Desk,
        call: Callable[[Stop], Answer],
        *,
        seconds: float | None = None,
        lane: Lane = Lane.CLICK,
        key: Hashable = None,
        number: int | None = None,
    ) -> Answer:
        """What a call on the pool's thread answers; SessionError when it is full, too slow, or this ask is superseded."""
        try:
            seconds = seconds or self.limits.timeout_seconds
            return await desk.pool.ask(frozenset({desk.role}), call, seconds, lane, key, number)
        except BusyError:
            raise busy() from None
        except SupersededError:
            raise SessionError("superseded", "A newer request of the same kind has taken this one's place.") from None
        except TimeoutError:
            raise SessionError("timeout", "The answer took too long; try again.", BUSY_RETRY_SECONDS) from None

    async def in_thread(self, call: Callable[[], Answer]) -> Answer:
        """Work for a CPU: so much at a time as there are threads. It has an end, so it is waited for even when cancelled."""
        return await anyio.to_thread.run_sync(call, limiter=self._threads)

    def _described(self, session_id: str, facts: Facts, model: Model) -> dict[str, Any]:
        expires_at = datetime.fromtimestamp(self._clock() + self.limits.ttl_seconds, UTC)
        return {
            "session_id": session_id,
            "width": facts.width,
            "height": facts.height,
            "expires_at": expires_at.isoformat(timespec="seconds").replace("+00:00", "Z"),
            "engine": model.engine,
            "model_id": model.model_id,
        }


def busy() -> SessionError:
    """As much waits as may."""
    return SessionError("busy", "Too many requests wait already; try again soon.", BUSY_RETRY_SECONDS)


def unknown() -> SessionError:
    """There is no such session (any more)."""
    return SessionError("session_unknown", "There is no such session; it may have expired. Upload the image again.")


def _facts(data: bytes) -> Facts:
    """What was stored; a session of which somebody else has written something is none."""
    try:
        facts = Facts(**json.loads(data))
    except (ValueError, TypeError):
        raise unknown() from None
    sound = type(facts.width) is int and type(facts.height) is int and isinstance(facts.content_hash, str)
    if not sound or min(facts.size_wh) < 1:
        raise unknown()
    return facts


def _full(error: SessionsFullError) -> SessionError:
    seconds = max(math.ceil(error.retry_seconds), 1)
    return SessionError("sessions_full", "There is no room for another session; try again later.", seconds)


def _decoded(data: bytes, limits: SessionLimits) -> tuple[Facts, ImageHWC, bytes]:
    """Its facts, the image at 1024 pixels a side, and that as it is kept; raises InvalidImageError."""
    decoded = images.decode(data, bytes_max=limits.bytes_max, pixels_max=limits.pixels_max, side_max=SIDE)
    return Facts(*decoded.size_wh, decoded.content_hash), decoded.pixels_hwc, images.kept(decoded.pixels_hwc)


def _npy(values: np.ndarray[Any, Any]) -> bytes:
    target = io.BytesIO()
    np.save(target, np.asarray(values, dtype=np.float32), allow_pickle=False)
    return target.getvalue()
