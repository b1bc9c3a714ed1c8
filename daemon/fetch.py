"""Fetch: brings what jobs need. Works of one image share one download and one decoded array.

Enters: works just claimed. Leaves: works with a Job, ready for their pool, or errors. Bounded in threads, in bytes, and
each download and decoding in seconds; waiting for one's turn does not count, since others cause it.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import anyio
import anyio.to_thread
import orjson
from anyio.abc import TaskGroup

from daemon.infer import TimedOutError
from daemon.keys import Keys, prefixes_of
from daemon.work import Work
from handlers.base import Inputs, Job, Limits, RejectedError, Request, SourceImage
from models.base import StoppedError
from storage import images
from storage.base import BlobStore, TaskStore, UnavailableError

NOTHING: Mapping[str, Any] = MappingProxyType({})
MASKS_BYTES_MAX = 64 * 1024 * 1024


class Budget:
    """Bytes of decoded images in flight. First come, first served; one image larger than all is let through alone."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._used = 0
        self._waiting: deque[tuple[int, anyio.Event]] = deque()

    async def take(self, size: int, at_once: bool = False) -> None:
        """Wait until `size` bytes fit. Who holds some already takes more `at_once`: two such could wait for each other."""
        if not at_once and (self._waiting or not self._fits(size)):
            turn = anyio.Event()
            entry = (size, turn)
            self._waiting.append(entry)
            try:
                await turn.wait()
            except BaseException:
                if turn.is_set():
                    self.give(size)
                else:
                    self._waiting.remove(entry)
                raise
        else:
            self._used += size

    def give(self, size: int) -> None:
        """`size` bytes are free again."""
        self._used -= size
        while self._waiting and self._fits(self._waiting[0][0]):
            next_size, turn = self._waiting.popleft()
            self._used += next_size
            turn.set()

    def _fits(self, size: int) -> bool:
        return self._used == 0 or self._used + size <= self._most


@dataclass(slots=True, eq=False)
class Shared:
    """One image that several works use: loaded once, its bytes given back when the last of them leaves."""

    key: str
    users: int = 0
    image: SourceImage | None = None
    error: Exception | None = None
    size: int = 0
    loaded: anyio.Event = field(default_factory=anyio.Event)


@dataclass(frozen=True, slots=True)
class FetchLimits:
    """Ceilings on what is fetched."""

    bytes_max: int
    pixels_max: int
    inflight_bytes: int
    io_threads: int
    decode_threads: int
    timeout_seconds: float


class Fetcher:
    """Makes jobs of works. `ready` and `fail` take them over."""

    def __init__(
        self,
        blobs: BlobStore,
        store: TaskStore,
        keys: Keys,
        templates: Sequence[str],
        limits: FetchLimits,
        ask_limits: Limits,
    ) -> None:
        self._blobs = blobs
        self._store = store
        self._keys = keys
        self._templates = templates
        self._limits = limits
        self._ask_limits = ask_limits
        self._budget = Budget(limits.inflight_bytes)
        self._io = anyio.CapacityLimiter(limits.io_threads)
        self._decoding = anyio.CapacityLimiter(limits.decode_threads)
        self._shared: dict[str, Shared] = {}
        self._used: dict[Work, list[Shared]] = {}
        self.ready: Callable[[Sequence[Work]], None] = lambda works: None
        self.fail: Callable[[Work, Exception], None] = lambda work, error: None

    def admit(self, tasks: TaskGroup, works: Sequence[Work]) -> None:
        """Validate works; those that need nothing are ready at once, the others when their inputs are here."""
        at_once = []
        for work in works:
            try:
                inputs = self._parse(work)
            except Exception as error:
                self.fail(work, error)
                continue
            if inputs.source or inputs.blobs or inputs.masks:
                tasks.start_soon(self._bring, work, inputs)
            else:
                work.job = Job(work.task.id, work.params, None, NOTHING, NOTHING)
                at_once.append(work)
        if at_once:
            self.ready(at_once)

    def leave(self, works: Iterable[Work]) -> None:
        """These works are settled; images that nobody else uses go."""
        for work in works:
            for shared in self._used.pop(work, ()):
                self._unuse(shared)

    def _parse(self, work: Work) -> Inputs:
        task = work.task
        request = Request(task.kind, task.source_image_url, task.text_prompt, params_of(task.params))
        work.params = work.handler.parse(request, self._ask_limits)
        return work.handler.inputs(work.params)

    async def _bring(self, work: Work, inputs: Inputs) -> None:
        started = time.monotonic()
        try:
            prefixes = prefixes_of(self._templates, work.task.user_id, work.task.project_id)
            source = await self._image(work, work.task.source_image_url, prefixes) if inputs.source else None
            more = {blob.name: await self._image(work, blob.url, prefixes) for blob in inputs.blobs}
            masks = {ref.name: await self._masks(work, ref.task_id, prefixes) for ref in inputs.masks}
        except StoppedError:
            return
        except Exception as error:
            self.fail(work, error)
            return
        if work.settling:
            return
        work.spent("fetch", started)
        work.job = Job(work.task.id, work.params, source, more, masks)
        self.ready([work])

    async def _image(self, work: Work, address: str | None, prefixes: Sequence[str]) -> SourceImage:
        if work.settling:  # it has left, and would not give back what it takes now
            raise StoppedError
        if not address:
            raise RejectedError("image_missing", "source_image_url is empty; name the uploaded image.")
        key = self._keys.key_of(address, prefixes)
        shared = self._shared.get(key)
        holds = work in self._used  # a holder waits for nobody: the one it waits for may wait for what it holds
        if shared is None or (holds and not shared.loaded.is_set()):
            shared, first = Shared(key), True
            self._shared.setdefault(key, shared)
        else:
            first = False
        shared.users += 1
        self._used.setdefault(work, []).append(shared)
        if first:
            await self._load(shared, at_once=holds)
        else:
            await shared.loaded.wait()
        if work.settling:  # it left meanwhile, and the image may have gone with it
            raise StoppedError
        if shared.error is not None:
            raise shared.error
        assert shared.image is not None
        return shared.image

    async def _load(self, shared: Shared, at_once: bool) -> None:
        """Download and decode; whatever goes wrong is the same for all that wait."""
        try:
            data = await self._in_thread(self._io, self._blobs.get, shared.key, self._limits.bytes_max)
            limits = {"bytes_max": self._limits.bytes_max, "pixels_max": self._limits.pixels_max}
            shape = await self._in_thread(self._decoding, partial(images.shape_of, data, **limits))
            size = len(data) + math.prod(shape)
            await self._budget.take(size, at_once)
            shared.size = size
            decoded = await self._in_thread(self._decoding, partial(images.decode, data, **limits))
            shared.image = _source_image(decoded, shared.key.rpartition("/")[2])
        except Exception as error:
            shared.error = error
        finally:
            if shared.image is None:
                if self._shared.get(shared.key) is shared:
                    del self._shared[shared.key]
                shared.error = shared.error or UnavailableError("fetching was cancelled")
            if shared.users == 0:
                self._free(shared)
            shared.loaded.set()

    async def _masks(self, work: Work, task_id: str, prefixes: Sequence[str]) -> Mapping[str, Any]:
        address = await self._store.masks_of(task_id, work.task.project_id)
        if address is None:
            raise RejectedError(
                "mask_missing", f"Task {task_id} is not a finished task of this project, so it has no masks to use."
            )
        data = await self._in_thread(self._io, self._blobs.get, self._keys.key_of(address, prefixes), MASKS_BYTES_MAX)
        dataset: dict[str, Any] = orjson.loads(data)
        return dataset

    async def _in_thread(self, limiter: anyio.CapacityLimiter, call: Callable[..., Any], *args: Any) -> Any:
        async with limiter:
            own_thread = anyio.CapacityLimiter(1)
            with anyio.move_on_after(self._limits.timeout_seconds):
                return await anyio.to_thread.run_sync(call, *args, limiter=own_thread, abandon_on_cancel=True)
        if limiter is self._io:
            raise UnavailableError("the blob store did not answer in time")  # nobody's fault, whoever's image it was
        raise TimedOutError(alone=True)

    def _unuse(self, shared: Shared) -> None:
        shared.users -= 1
        if shared.users == 0:
            if self._shared.get(shared.key) is shared:
                del self._shared[shared.key]
            self._free(shared)

    def _free(self, shared: Shared) -> None:
        if shared.size:
            self._budget.give(shared.size)
            shared.size = 0
        shared.image = None


def _source_image(decoded: images.DecodedImage, name: str) -> SourceImage:
    return SourceImage(decoded.pixels_hwc, decoded.content_hash, name, decoded.alpha_hw, decoded.icc_profile, decoded.format)


def params_of(text: str | bytes) -> Mapping[str, Any]:
    """Params of a row or a request; RejectedError when they are no object, or more than Python reads."""
    if text == "{}":
        return NOTHING
    try:
        params = orjson.loads(text)
    except (RecursionError, ValueError) as error:
        reason = str(error).partition(": line ")[0]
        if isinstance(error, RecursionError) or reason.startswith(("depth limit", "number is infinity")):
            sentence = "params cannot be read: lists or numbers in it go too deep; simplify it."
        else:
            sentence = f"This is not valid JSON: {reason}."
        raise RejectedError("params_invalid", sentence) from error
    if not isinstance(params, dict):
        raise RejectedError("params_invalid", "params must be a JSON object.")
    return params
