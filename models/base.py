"""What a model is to the rest of maskd: protocols by role, and the values that go in and come out.

Enters: RGB uint8 arrays and prompts in pixels of that image. Leaves: `Embedding` and `Mask` values. Imports no GPU library.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

ImageHWC = npt.NDArray[np.uint8]
MaskHW = npt.NDArray[np.bool_]
Stop = Callable[[], None]
"""Called between steps of long work; raises `StoppedError` when nobody wants the answer any more."""


class StoppedError(Exception):
    """The task was cancelled, lost or out of time; the work in hand is thrown away."""


class Role(enum.StrEnum):
    """What a model can do; a kind runs only where every role that it needs has an engine."""

    VISUAL = "visual"
    EVERYTHING = "everything"
    CONCEPT = "concept"
    INPAINT = "inpaint"
    GENERATE = "generate"


@dataclass(frozen=True, slots=True)
class Mask:
    """One mask, kept as packed bits inside its own box.

    `box_xyxy` is half-open, in pixels of the image; `bits` has shape (height, ceil(width / 8)), uint8, as
    `np.packbits(mask_hw, axis=1)` gives it. An empty mask has the box (0, 0, 0, 0) and no bits.
    """

    box_xyxy: tuple[int, int, int, int]
    bits: npt.NDArray[np.uint8]
    score: float = 1.0
    predicted_iou: float | None = None
    stability_score: float | None = None
    label: str | None = None

    @property
    def area(self) -> int:
        """Number of pixels inside the mask."""
        return int(np.bitwise_count(self.bits).sum())

    def crop_hw(self) -> MaskHW:
        """The mask inside its box, bool, shape (y1 - y0, x1 - x0)."""
        x0, y0, x1, y1 = self.box_xyxy
        if x1 <= x0 or y1 <= y0:
            return np.zeros((0, 0), dtype=np.bool_)
        return np.unpackbits(self.bits, axis=1, count=x1 - x0).view(np.bool_)

    def window_hw(self, box_xyxy: tuple[int, int, int, int]) -> MaskHW:
        """The mask as seen through any box of the image, bool, shape (y1 - y0, x1 - x0); outside the mask's own box False."""
        x0, y0, x1, y1 = box_xyxy
        seen_hw = np.zeros((max(y1 - y0, 0), max(x1 - x0, 0)), dtype=np.bool_)
        left, top = max(x0, self.box_xyxy[0]), max(y0, self.box_xyxy[1])
        right, bottom = min(x1, self.box_xyxy[2]), min(y1, self.box_xyxy[3])
        if left < right and top < bottom:
            own_x, own_y = self.box_xyxy[:2]
            rows_hw = np.unpackbits(self.bits[top - own_y : bottom - own_y], axis=1, count=right - own_x).view(np.bool_)
            seen_hw[top - y0 : bottom - y0, left - x0 : right - x0] = rows_hw[:, left - own_x :]
        return seen_hw


def pack(
    mask_hw: MaskHW | npt.NDArray[np.uint8],
    offset_xy: tuple[int, int] = (0, 0),
    *,
    score: float = 1.0,
    predicted_iou: float | None = None,
    stability_score: float | None = None,
    label: str | None = None,
) -> Mask:
    """A mask from a crop (bool, or uint8: not 0 is inside) whose corner lies at `offset_xy` of the image; its box is tight."""
    box_xyxy, bits = (0, 0, 0, 0), np.zeros((0, 0), dtype=np.uint8)
    rows = np.flatnonzero(mask_hw.any(axis=1))
    if rows.size:
        top, bottom = int(rows[0]), int(rows[-1]) + 1
        columns = np.flatnonzero(mask_hw[top:bottom].any(axis=0))
        left, right = int(columns[0]), int(columns[-1]) + 1
        bits = np.packbits(mask_hw[top:bottom, left:right], axis=1)
        box_xyxy = (left + offset_xy[0], top + offset_xy[1], right + offset_xy[0], bottom + offset_xy[1])
    return Mask(box_xyxy, bits, score, predicted_iou, stability_score, label)


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the user pointed at, for one object. Pixels of the image; label 1 = foreground, 0 = background."""

    points_xy: tuple[tuple[float, float], ...] = ()
    labels: tuple[int, ...] = ()
    box_xyxy: tuple[float, float, float, float] | None = None
    mask: Mask | None = None


@dataclass(frozen=True, slots=True)
class ConceptPrompt:
    """What kind of thing to look for: words, or boxes around examples of it, or both. Pixels of the image; label 1 = such,
    0 = not such."""

    text: str | None = None
    boxes_xyxy: tuple[tuple[float, float, float, float], ...] = ()
    labels: tuple[int, ...] = ()


def untold(done: float) -> None:
    """What becomes of progress that nobody asked for."""


@dataclass(frozen=True, slots=True)
class EverythingOptions:
    """How finely to look for all masks of an image (names and meaning as in segment-anything's mask generator).

    `crop_layers`: look also into 2 x 2 overlapping crops, then 4 x 4 and so on, as far as the engine was loaded to keep crops;
    None: into all that it keeps. `progress` is told the share that is done, 0..1, between steps.
    """

    points_per_side: int = 32
    pred_iou_thresh: float = 0.88
    stability_score_thresh: float = 0.95
    box_nms_thresh: float = 0.7
    min_mask_area: int = 0
    crop_layers: int | None = None
    progress: Callable[[float], None] = field(default=untold, compare=False)


@dataclass(frozen=True, slots=True)
class View:
    """An image on its way into a model. `small` is what the model's `shrink` made of it, None while its embedding is kept.
    `size_hw` is set where `image_hwc` is a reduced copy: that of the image it was made of, in whose pixels masks are wanted.
    """

    content_hash: str
    image_hwc: ImageHWC
    small: Any = None
    size_hw: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Embedding:
    """An image as a model sees it, computed once and prompted many times. A value: nothing changes it."""

    size_hw: tuple[int, int]
    data: Any
    nbytes: int


@dataclass(frozen=True, slots=True)
class VisualQuestion:
    """One object of one image. `multimask`: three answers or one; None lets a lone point try three and keep the best."""

    embedding: Embedding
    prompt: Prompt
    multimask: bool | None = None


@dataclass(frozen=True, slots=True)
class ConceptQuestion:
    """One concept in one image: every instance whose score is at least `threshold`, at most the best `max_instances`."""

    embedding: Embedding
    prompt: ConceptPrompt
    threshold: float = 0.5
    max_instances: int = 100


Later = Callable[[], list[Mask]]
"""The masks of an answer, once it is called: it enlarges them, which is work for any CPU thread but not for a device's.
Called again it answers the same; it holds no memory of a device."""


class Model(Protocol):
    """What every engine says of itself; written into each result's metadata."""

    @property
    def engine(self) -> str: ...
    @property
    def model_id(self) -> str: ...
    @property
    def device(self) -> str: ...


class Embedder(Model, Protocol):
    """A model that looks at images before any prompt, in two steps, so that a device never waits for the CPU."""

    def shrink(self, image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> Any:
        """What `embed` needs of one image: resized, still small integers. `size_hw` is that of the image of which this one is a
        reduced copy: prompts and masks are in its pixels. Any CPU thread."""
        ...

    def embed(self, smalls: Sequence[Any]) -> list[Embedding]:
        """The embeddings of what `shrink` made, in order, in one pass where the model can. The pool's thread."""
        ...


class VisualSegmenter(Embedder, Protocol):
    """Clicks, boxes and masks to masks."""

    def segment(self, questions: Sequence[VisualQuestion], stop: Stop) -> list[Later]:
        """Per question one mask, or three with scores, best first; questions of several images may come together."""
        ...


class EverythingSegmenter(Embedder, Protocol):
    """All masks of an image."""

    def everything(self, embedding: Embedding, options: EverythingOptions, stop: Stop) -> Later:
        """Every mask worth returning, largest first."""
        ...


class ConceptSegmenter(Embedder, Protocol):
    """Words and examples to every instance of what they mean."""

    @property
    def tokens_max(self) -> int:
        """How many tokens of text the model reads."""
        ...

    def tokens(self, text: str) -> int:
        """How many tokens a text has, its ends included. Any thread."""
        ...

    def find(self, questions: Sequence[ConceptQuestion], stop: Stop) -> list[Later]:
        """Per question all instances, best score first; equal questions are computed once."""
        ...


@dataclass(frozen=True, slots=True)
class Hole:
    """What of an image is to be painted over."""

    image_hwc: ImageHWC
    mask: Mask


@dataclass(frozen=True, slots=True)
class Patch:
    """New pixels for a box of an image, uint8 (y1 - y0, x1 - x0, 3); only those inside the hole's mask count."""

    box_xyxy: tuple[int, int, int, int]
    pixels_hwc: ImageHWC


class Inpainter(Model, Protocol):
    """Holes to what might have been behind them, without being told."""

    def inpaint(self, holes: Sequence[Hole], stop: Stop) -> list[list[Patch]]:
        """Per hole the patches that cover its mask; holes of several images may come together."""
        ...


@dataclass(frozen=True, slots=True)
class Canvas:
    """A picture whose part under `mask_hw` (bool, True = paint anew) is to show what the prompt says; both sides are multiples of
    8. The same picture with the same seed gives the same answer, alone or beside others."""

    image_hwc: ImageHWC
    mask_hw: MaskHW
    prompt: str
    negative_prompt: str = ""
    seed: int = 0
    steps: int = 50
    guidance_scale: float = 7.5


Progress = Callable[[float], None]
"""Hears how much of a long work is done, 0..1."""


class Generator(Model, Protocol):
    """Words to pictures that go on where the given part ends."""

    @property
    def side(self) -> int:
        """The side of the pictures that the model was made for, in pixels."""
        ...

    @property
    def tokens_max(self) -> int:
        """How many tokens of a prompt the model reads."""
        ...

    def tokens(self, text: str) -> int:
        """How many tokens a text has, its ends included. Any thread."""
        ...

    def generate(self, pictures: Sequence[Canvas], stop: Stop, progress: Progress) -> list[ImageHWC]:
        """Per picture one of the same size; pixels outside its mask may differ from the given ones. `stop` between steps."""
        ...


class Embeddings(Protocol):
    """Where embeddings are kept between tasks (`models.cache.EmbeddingCache`)."""

    def view(self, embedder: Embedder, content_hash: str, image_hwc: ImageHWC, size_hw: tuple[int, int] | None = None) -> View:
        """The image, shrunk unless its embedding is there. Any CPU thread."""
        ...

    def get(self, embedder: Embedder, views: Sequence[View], of_session: bool = False) -> list[tuple[Embedding, bool]]:
        """Per view its embedding by that model and whether it was already there; the others are computed together."""
        ...

    def kept(self, embedder: Embedder, content_hash: str) -> Embedding | None:
        """The embedding of a session's image if it is there."""
        ...

    def discard(self, content_hash: str) -> None:
        """Forget that image for every model."""
        ...


class DeviceLostError(Exception):
    """The device answers nothing any more (a poisoned CUDA context): the process must end and start anew."""


def no_room_needed(roles: frozenset[Role], models: Models) -> None:
    """What a pool without a device of its own does before a batch."""


@dataclass(frozen=True, slots=True)
class Models:
    """The engines that one pool holds, by role. The pool's thread calls `make_room` with the roles of a batch before it runs."""

    embeddings: Embeddings
    visual: VisualSegmenter | None = None
    everything: EverythingSegmenter | None = None
    concept: ConceptSegmenter | None = None
    inpaint: Inpainter | None = None
    generate: Generator | None = None
    make_room: Callable[[frozenset[Role], Models], None] = no_room_needed

    def roles(self) -> frozenset[Role]:
        """The roles that have an engine here."""
        return frozenset(self._held())

    def of(self, role: Role) -> Model:
        """The engine of a role that this pool holds; KeyError when it holds none."""
        return self._held()[role]

    def _held(self) -> dict[Role, Model]:
        held: dict[Role, Model | None] = {
            Role.VISUAL: self.visual,
            Role.EVERYTHING: self.everything,
            Role.CONCEPT: self.concept,
            Role.INPAINT: self.inpaint,
            Role.GENERATE: self.generate,
        }
        return {role: model for role, model in held.items() if model is not None}
