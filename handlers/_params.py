"""The shapes that a row's `params` may take: points, boxes and mask references, in every accepted spelling.

Enters: JSON values as the row has them. Leaves: validated values, or one sentence that says what to change.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, TypeVar
from uuid import UUID

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails, PydanticCustomError

from handlers.base import Limits, RejectedError

COORDINATE_MAX = 1e6
ENTRIES_MAX = 10_000
"""Of one list, far above what any setting allows: more is refused before any of it is looked at."""
COUNTS_MAX = 200_000
"""Of run lengths written as a list; the compressed string has no such bound."""
VALUES_MAX = 200_000
"""Of all lists and objects together, but for run lengths."""
NAME_SHOWN = 40
SENTENCE_SHOWN = 300


class Strict(BaseModel):
    """Parameters that refuse names they do not know, naming the nearest one that they do."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _known_names(cls, values: Any) -> Any:
        """Runs before pydantic's own check, which names no neighbour."""
        if isinstance(values, Mapping):
            for name in values:
                if name not in cls.model_fields:
                    raise PydanticCustomError("unknown_name", "{what}", {"what": _unknown(name, list(cls.model_fields))})
        return values


def _unknown(name: Any, known: list[str]) -> str:
    shown = _shown(name)
    nearest = difflib.get_close_matches(shown, known, n=1, cutoff=0.0)
    return f'the parameter "{shown}" is not known' + (f'; did you mean "{nearest[0]}"?' if nearest else "")


def _shown(name: Any) -> str:
    text = name if isinstance(name, str) else str(name)
    return text if len(text) <= NAME_SHOWN else text[:NAME_SHOWN] + "…"


Coordinate = Annotated[float, Field(ge=-COORDINATE_MAX, le=COORDINATE_MAX, allow_inf_nan=False)]


class Point(Strict):
    """A click in pixels of the image; label 1 = foreground, 0 = background."""

    x: Coordinate
    y: Coordinate
    label: Annotated[int, Field(ge=0, le=1)] = 1


def _point(value: Any) -> Any:
    """`[x, y]` and `[x, y, label]` as `{"x", "y", "label"}`."""
    if isinstance(value, list | tuple):
        if len(value) not in (2, 3):
            raise PydanticCustomError("point_shape", "a point is [x, y], [x, y, label] or an object with x, y and label")
        return dict(zip(("x", "y", "label"), value, strict=False))
    return value


AnyPoint = Annotated[Point, BeforeValidator(_point)]
Box = tuple[Coordinate, Coordinate, Coordinate, Coordinate]
"""x0, y0, x1, y1 in pixels of the image."""
Vertex = tuple[Coordinate, Coordinate]
Share = Annotated[float, Field(ge=0, le=1)]


class Rle(Strict):
    """A mask as COCO run lengths, column by column: `size` is [height, width], `counts` a list or COCO's compressed string."""

    size: tuple[Annotated[int, Field(ge=1, le=65535)], Annotated[int, Field(ge=1, le=65535)]]
    counts: str | Annotated[list[Annotated[int, Field(ge=0)]], Field(fail_fast=True)]


class MaskSource(Strict):
    """Where a mask comes from: exactly one of an earlier task, run lengths, a polygon and an image (above 127 = inside; its
    alpha, where it has any, else its brightest channel)."""

    task_id: UUID | None = None
    mask_ids: Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=1, max_length=1000, fail_fast=True)] | None = None
    rle: Rle | None = None
    polygon: Annotated[list[Vertex], Field(min_length=3, fail_fast=True)] | None = None
    image_url: Annotated[str, Field(min_length=1, max_length=2048)] | None = None

    @model_validator(mode="after")
    def _one_source(self) -> MaskSource:
        given = [value for value in (self.task_id, self.rle, self.polygon, self.image_url) if value is not None]
        if len(given) != 1:
            raise PydanticCustomError(
                "mask_source", "a mask is exactly one of task_id (with mask_ids), rle, polygon and image_url"
            )
        if self.mask_ids is not None and self.task_id is None:
            raise PydanticCustomError("mask_source", "mask_ids needs the task_id whose masks they are")
        return self


class Pointing(Strict):
    """Points in either spelling: `points`, or `point_coords` with `point_labels`."""

    points: Annotated[list[AnyPoint], Field(fail_fast=True)] | None = None
    point_coords: Annotated[list[Vertex], Field(fail_fast=True)] | None = None
    point_labels: Annotated[list[Annotated[int, Field(ge=0, le=1)]], Field(fail_fast=True)] | None = None

    @model_validator(mode="after")
    def _one_spelling(self) -> Pointing:
        if self.points is not None and self.point_coords is not None:
            raise PydanticCustomError("points_twice", "give either points or point_coords, not both")
        if self.point_labels is not None and len(self.point_labels) != len(self.point_coords or ()):
            raise PydanticCustomError("labels_length", "point_labels needs one label for each of point_coords")
        return self

    def all_points(self) -> list[Point]:
        """The points, whichever way they were spelled."""
        coords = self.point_coords or []
        labels = self.point_labels or [1] * len(coords)
        return [
            *(self.points or []),
            *(Point(x=x, y=y, label=label) for (x, y), label in zip(coords, labels, strict=True)),
        ]


class ObjectPrompt(Pointing):
    """What points at one object: any of points, a box and a mask."""

    box: Box | None = None
    mask: MaskSource | None = None


class VisualPrompts(Pointing):
    """What points at objects: `objects`, or `points` / `boxes` at the top for the simple case."""

    objects: Annotated[list[ObjectPrompt], Field(fail_fast=True)] | None = None
    boxes: Annotated[list[Box], Field(fail_fast=True)] | None = None

    def all_objects(self) -> list[ObjectPrompt]:
        """One entry per object; raises RejectedError when nothing is pointed at, or the simple case is not simple."""
        points, boxes = self.all_points(), self.boxes or []
        if self.objects and (points or boxes):
            raise RejectedError("params_invalid", "Give either objects, or points and boxes beside it, not both.")
        if points and len(boxes) > 1:
            raise RejectedError(
                "params_invalid", "Points beside several boxes are ambiguous; use objects to say which belong together."
            )
        objects = list(self.objects or [ObjectPrompt(box=box) for box in boxes])
        if points:
            objects = [ObjectPrompt(points=points, box=boxes[0] if boxes else None)]
        for index, wanted in enumerate(objects):
            pointed = any(point.label == 1 for point in wanted.all_points())
            if not pointed and wanted.box is None and wanted.mask is None:
                raise RejectedError("prompt_invalid", f"Object {index} needs at least one foreground point, a box or a mask.")
        if not objects:
            raise RejectedError("prompt_invalid", "Point at something: give points, boxes or objects.")
        return objects


Params = TypeVar("Params", bound=BaseModel)


def read(shape: type[Params], values: Mapping[str, Any]) -> Params:
    """The row's `params` in their shape; raises RejectedError("params_invalid", one sentence)."""
    _check_lengths(values)
    try:
        return shape.model_validate(dict(values))
    except ValidationError as error:
        raise rejected(error) from None


def _check_lengths(values: Mapping[str, Any]) -> None:
    """Raise RejectedError when there is more than anyone needs, at a cost that what is sent cannot raise."""
    rest, left = [*values.items()], VALUES_MAX - len(values)
    while rest:
        name, value = rest.pop()
        if not isinstance(value, list | dict):
            continue
        counts = name == "counts" and isinstance(value, list)
        most = COUNTS_MAX if counts else ENTRIES_MAX
        if len(value) > most:
            compressed = "; send longer run lengths as COCO's compressed string" if counts else ""
            raise RejectedError(
                "params_invalid", f"In {_shown(name)}: {len(value)} entries are too many; at most {most} are read{compressed}."
            )
        if counts:
            continue
        left -= len(value)
        if left < 0:
            raise RejectedError("params_invalid", f"There are more than {VALUES_MAX} values; send fewer at a time.")
        rest += value.items() if isinstance(value, dict) else [(name, item) for item in value]


def rejected(error: ValidationError) -> RejectedError:
    """One readable sentence about the first thing that is wrong, and how many more there are."""
    details = error.errors(include_url=False, include_input=False, include_context=False)
    more = f" ({len(details) - 1} more)" if len(details) > 1 else ""
    sentence = _sentence(details[0])
    if len(sentence) > SENTENCE_SHOWN:
        sentence = sentence[:SENTENCE_SHOWN] + "…"
    return RejectedError("params_invalid", f"{sentence}{more}.".replace("?.", "?"))


def _sentence(detail: ErrorDetails) -> str:
    message = detail["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    should = "should be " if message != detail["msg"] else ""
    where = _path(detail["loc"])
    message = message[:1].lower() + message[1:]
    return f"In {where}: {should}{message}" if where else message[:1].upper() + message[1:]


def _path(location: tuple[int | str, ...]) -> str:
    """("objects", 0, "points") as objects[0].points."""
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location)
    return path.removeprefix(".")


def check_objects(objects: list[ObjectPrompt], limits: Limits) -> None:
    """Raise RejectedError when there are more objects or points than a task may have."""
    if len(objects) > limits.objects_max:
        raise RejectedError("params_invalid", f"There are {len(objects)} objects; at most {limits.objects_max} are allowed.")
    points = sum(len(wanted.all_points()) for wanted in objects)
    if points > limits.points_max:
        raise RejectedError("params_invalid", f"There are {points} points; at most {limits.points_max} are allowed.")


def check_mask_images(sources: Iterable[MaskSource], limits: Limits) -> None:
    """Raise RejectedError when masks stand in more images than a task may have decoded."""
    urls = {source.image_url for source in sources if source.image_url is not None}
    if len(urls) > limits.mask_images_max:
        raise RejectedError(
            "params_invalid", f"There are {len(urls)} images of masks; at most {limits.mask_images_max} are allowed."
        )


def check_text(text: str | None, limits: Limits) -> str | None:
    """The text without surrounding space, None when there is none; raises RejectedError when it is too long."""
    text = (text or "").strip()
    if len(text) > limits.text_characters_max:
        raise RejectedError(
            "params_invalid", f"The text has {len(text)} characters; at most {limits.text_characters_max} are allowed."
        )
    return text or None
