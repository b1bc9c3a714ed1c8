"""What a kind is: a module with the names of `Handler`, found by its file name.

Enters: a `Request` (the row's wish), then a `Job` (the wish, validated, with its images). Leaves: a `Result` with encoded bytes.
Never any network, database or await.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt

from models.base import ImageHWC, Models, Progress, Role, Stop, untold


class RejectedError(Exception):
    """The task asks for something that cannot be done; the user reads `code` and `message`.

    `code` is one of the error codes of the README, `message` one sentence that says what to change.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class UnservedError(RejectedError):
    """This worker lacks what the task needs, another may have it: the task is tried again, here or there."""

    def __init__(self, message: str) -> None:
        super().__init__("engine_unavailable", message)


@dataclass(frozen=True, slots=True)
class Limits:
    """Ceilings on what one task may ask; each is a setting with this default."""

    text_characters_max: int = 1000
    points_max: int = 256
    objects_max: int = 64
    points_per_side_max: int = 64
    masks_max: int = 100
    mask_images_max: int = 8
    texts_max: int = 16
    instances_max: int = 200
    result_masks_max: int = 400
    side_max: int = 8192
    pixels_max: int = 50_000_000
    steps_max: int = 50
    dilate_max: int = 255
    blur_max: float = 100.0


@dataclass(slots=True, eq=False)  # one a task: freezing would cost more than all the rest of making it
class Request:
    """What a row asks for, as it was written."""

    kind: str
    source_image_url: str | None
    text_prompt: str | None
    params: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class BlobRef:
    """An image that a task names besides its source, by the address in the row."""

    name: str
    url: str


@dataclass(frozen=True, slots=True)
class MasksRef:
    """Masks that an earlier task of the same project left behind (all of them when `mask_ids` is None)."""

    name: str
    task_id: str
    mask_ids: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class Inputs:
    """What fetch has to bring before a job can run."""

    source: bool = True
    blobs: tuple[BlobRef, ...] = ()
    masks: tuple[MasksRef, ...] = ()


@dataclass(frozen=True, slots=True)
class SourceImage:
    """A decoded image, upright: RGB uint8 (height, width, 3), and the SHA-256 of the bytes it came from.

    `pixels_hwc` lies on white where `alpha_hw`, uint8 (height, width), is below 255; None where all is opaque. `format` is
    JPEG, PNG, WEBP, BMP, TIFF or HEIC; `icc_profile` describes RGB.
    """

    pixels_hwc: ImageHWC
    content_hash: str
    name: str
    alpha_hw: npt.NDArray[np.uint8] | None = None
    icc_profile: bytes | None = None
    format: str = "PNG"

    @property
    def size_wh(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.pixels_hwc.shape[1], self.pixels_hwc.shape[0]


@dataclass(slots=True, eq=False)  # one a task: freezing would cost more than all the rest of making it
class Job:
    """A task decoded and validated, in memory.

    `params` is what the handler's own `parse` returned; `images` holds the resolved `BlobRef`s by name and `masks`
    the COCO dataset (a dict) of each resolved `MasksRef` by name.
    """

    task_id: str
    params: Any
    image: SourceImage | None = None
    images: Mapping[str, SourceImage] = field(default_factory=dict)
    masks: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


Column = Literal["mask_image_url", "masks_url", "result_image_url"]


@dataclass(frozen=True, slots=True)
class ResultBlob:
    """One file of a result, and the column of the row that will point to it."""

    column: Column
    name: str
    content_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class Result:
    """What a task leaves behind: files, the short list for the app, and facts about how it was made."""

    blobs: tuple[ResultBlob, ...] = ()
    labels: list[dict[str, Any]] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)


class Handler(Protocol):
    """A module `handlers/<kind>.py`. Everything is called from threads; nothing here may touch the outside."""

    ROLES: frozenset[Role]
    """Roles whose engines `run` uses."""
    BATCH_MAX: int
    """Most jobs that `run` takes at once."""
    TIMEOUT_FACTOR: float
    """Times `MASKD_TIMEOUT_SECONDS` that one job may take."""

    def parse(self, request: Request, limits: Limits) -> Any:
        """The kind's own parameters, validated; raises RejectedError."""
        ...

    def inputs(self, params: Any) -> Inputs:
        """What must be fetched for these parameters."""
        ...

    def prepare(self, job: Job, models: Models) -> Any:
        """What `run` needs of one job: its image as the model wants it, its prompts; raises RejectedError (a prompt outside
        the image). Any CPU thread: of `models` only what may be asked there (`Embeddings.view`, `ConceptSegmenter.tokens`).
        """
        ...

    def run(self, prepared: Sequence[Any], models: Models, stop: Stop) -> Sequence[Any]:
        """One raw answer or exception per prepared job, in order. The pool's thread; calls `stop()` between steps, and where it
        takes long tells `progress_of(stop)` how far it is."""
        ...

    def finish(self, job: Job, raw: Any) -> Result:
        """Encode one raw answer into files, labels and metadata. CPU thread."""
        ...


def progress_of(stop: Stop) -> Progress:
    """Whom `run` tells the share of its work that is done, 0..1: a pool's `stop` has a `progress` for it, which may be called as
    often as one likes."""
    progress: Progress = getattr(stop, "progress", untold)
    return progress


def roles_in(handler: Handler, held: frozenset[Role]) -> frozenset[Role]:
    """The roles that a handler uses in a pool that holds these: its `ROLES`, and what it `MAY_USE`, if it says so."""
    may_use: frozenset[Role] = getattr(handler, "MAY_USE", frozenset())
    return handler.ROLES | (may_use & held)
