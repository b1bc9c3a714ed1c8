"""The gallery page: photos with the masks that were found drawn over them, the prompts, and the rows as JSON beside.

Enters: finished tasks with the bytes of their files. Leaves: one HTML page that needs nothing else, no script and no network.
"""

from __future__ import annotations

import io
import json
import zlib
from base64 import b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

STYLE = Path(__file__).with_name("gallery.css")
MANY = 12
"""From so many masks on the outlines are thin, so that they do not hide the photo."""
FOUND_MAX = 6
POINT_SHARE = 0.021
"""Radius of a point, as a share of the photo's longer side."""

WELCOME = "Rows went into a table, masks and images came out. Point at a mask to see what it is, at an image to see it before."
POINTING = ("boxes", "points", "objects", "masks", "layers")
"""Params that are drawn, or said in words of their own."""

Object = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class File:
    """A file that a task left behind, and where it was put beside the page."""

    name: str
    content_type: str
    data: bytes

    def inline(self) -> str:
        """As an address that holds the data itself."""
        return f"data:{self.content_type};base64,{b64encode(self.data).decode()}"


@dataclass(frozen=True, slots=True)
class Card:
    """One task: what was asked, its row, and its files by the row's column (`mask_image_url`, `masks_url`, …)."""

    title: str
    photo: File
    params: Object
    text: str | None
    row: Object
    files: Mapping[str, File] = field(default_factory=dict)

    def annotations(self) -> list[Object]:
        """Of the COCO dataset, in order of id."""
        file = self.files.get("masks_url")
        found: list[Object] = [] if file is None else json.loads(file.data)["annotations"]
        return found

    def colours(self) -> dict[int, str]:
        """By id, of the masks that the mask image shows."""
        return {int(label["id"]): str(label["color"]) for label in self.row["labels"] or () if label["color"]}


@dataclass(frozen=True, slots=True)
class Pointed:
    """What a task points with, in pixels of the photo: x0, y0, x1, y1; x, y, label; corners."""

    boxes: list[Sequence[float]]
    points: list[tuple[float, float, int]]
    polygons: list[Sequence[Sequence[float]]]


def page(cards: Sequence[Card], seconds: float, footer: str = "") -> str:
    """The whole page; `seconds` is how long all tasks took together."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>maskd demo</title>
<style>
{STYLE.read_text(encoding="utf-8")}{_backgrounds(cards)}</style>
<header>
<div><h1>maskd demo</h1><p>{WELCOME}</p></div>
{_summary(cards, seconds)}
<fieldset>{"".join(_switch(name) for name in ("masks", "outlines", "prompts"))}</fieldset>
</header>
<main>
{"".join(_card(card) for card in cards)}</main>
<footer>{_text(footer)}</footer>
</html>
"""


def _summary(cards: Sequence[Card], seconds: float) -> str:
    done = [card.row["metadata"] or {} for card in cards if card.row["status"] == "done"]
    engines = ", ".join(sorted({f"{facts.get('engine')} on {facts.get('device')}" for facts in done}))
    masks = sum(int(facts.get("count") or 0) for facts in done)
    facts = {"tasks": len(cards), "done": len(done), "masks": masks, "seconds": f"{seconds:.1f}", "engine": engines or "none"}
    items = [f"<div><dt>{name}</dt><dd>{_text(value)}</dd></div>" for name, value in facts.items()]
    return f"<dl>{''.join(items)}</dl>"


def _backgrounds(cards: Sequence[Card]) -> str:
    """The photos once more for use behind and below the large ones; each only once, however many cards show it."""
    photos = {card.photo.name: card.photo for card in cards}
    return "".join(f".{_class(photo)} {{ background-image: url({photo.inline()}); }}\n" for photo in photos.values())


def _class(photo: File) -> str:
    return f"photo-{zlib.crc32(photo.data):08x}"


def _switch(name: str) -> str:
    return f'<label><input type="checkbox" id="show-{name}" checked>{name}</label>'


def _card(card: Card) -> str:
    return f"""<article class="{_text(card.row["status"])}{"" if card.row["status"] == "done" else " failed"}">
{_stage(card)}
{_answers(card)}<div class="words">
<h2>{_text(card.title)}</h2>
{_chips(card)}
<ul class="asked">{"".join(f"<li>{_text(word)}</li>" for word in in_words(card.params, card.text))}</ul>
{_problem(card)}{_found(card)}<details><summary>row and files</summary>{_links(card)}<pre>{_text(_json(card))}</pre></details>
</div>
</article>
"""


def _stage(card: Card) -> str:
    """The photo, the very mask image that was written over it, outlines and prompts; or the image that was made, and in a corner
    the photo that it was made of."""
    photo, result = card.photo.inline(), card.files.get("result_image_url")
    parts = [f'<div class="backdrop {_class(card.photo)}"></div>']
    parts.append(f'<img src="{photo}" alt="{_text(card.title)}">')
    if result is not None:
        width, height = _size(card.photo)
        before = f'<div class="{_class(card.photo)}"></div>{_prompts(card)}<figcaption>before</figcaption>'
        parts.append(f'<img class="after" src="{result.inline()}" alt="{_text(card.title)}, done">')
        parts.append(f'<figure class="before" style="aspect-ratio: {width} / {height}">{before}</figure>')
        return f'<figure class="stage">{"".join(parts)}</figure>'
    mask = card.files.get("mask_image_url")
    if mask is not None:
        parts.append(f'<img class="mask" src="{mask.inline()}" alt="">')
        parts.append(_outlines(card))
    parts.append(_prompts(card))
    return f'<figure class="stage">{"".join(parts)}</figure>'


def _outlines(card: Card) -> str:
    """Large masks first, so that small ones on top of them can be pointed at."""
    colours = card.colours()
    shown = sorted((each for each in card.annotations() if each["id"] in colours), key=lambda each: -each["area"])
    names = _names(card)
    paths = [
        f'<path class="halo" d="{_path(each)}"/><path class="shape" style="--own:{_text(colours[each["id"]])}" d="{_path(each)}">'
        f"<title>{_text(names.get(each['id'], ''))}</title></path>"
        for each in shown
    ]
    return _svg(card.photo, "outlines many" if len(shown) >= MANY else "outlines", "".join(paths))


def _prompts(card: Card) -> str:
    size_wh, asked = _size(card.photo), pointed(card.params)
    corners = [f"{x0:g},{y0:g} {x1:g},{y0:g} {x1:g},{y1:g} {x0:g},{y1:g}" for x0, y0, x1, y1 in asked.boxes]
    corners += [" ".join(f"{x:g},{y:g}" for x, y in polygon) for polygon in asked.polygons]
    lines = [f'<polygon class="{layer}" points="{points}"/>' for points in corners for layer in ("under", "over")]
    return _svg(card.photo, "prompts", "".join([*lines, *(_dot(x, y, label, size_wh) for x, y, label in asked.points)]))


def _dot(x: float, y: float, label: int, size_wh: tuple[int, int]) -> str:
    """A green plus for foreground, a red minus for background."""
    radius = POINT_SHARE * max(size_wh)
    arm = radius * 0.5
    cross = f"M{x - arm:g} {y:g}h{2 * arm:g}" + (f"M{x:g} {y - arm:g}v{2 * arm:g}" if label else "")
    dot = f'<circle class="{"yes" if label else "no"}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>'
    return f'{dot}<path d="{cross}" stroke-width="{radius * 0.28:g}"/>'


def _answers(card: Card) -> str:
    """With `multimask` every answer to the same question, best first."""
    annotations = card.annotations()
    if not annotations or len(annotations) == len(card.colours()) or not card.colours():
        return ""
    own = next(iter(card.colours().values()))
    figures = [
        f'<figure class="stage"><div class="{_class(card.photo)}"></div>'
        + _svg(card.photo, "", f'<path style="--own:{_text(own)}" d="{_path(each)}"/>')
        + f"<figcaption>{'best, ' if place == 0 else ''}{each['score']:.2f}</figcaption></figure>"
        for place, each in enumerate(annotations)
    ]
    return f'<div class="answers">{"".join(figures)}</div>\n'


def _chips(card: Card) -> str:
    row, facts = card.row, card.row["metadata"] or {}
    seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f} s"
    chips = [("kind", row["kind"]), (row["status"], row["status"]), ("", facts.get("engine", "")), ("", seconds)]
    items = [f'<li class="{_text(name)}">{_text(value)}</li>' for name, value in chips if value]
    return f'<ul class="chips">{"".join(items)}</ul>'


def _problem(card: Card) -> str:
    error = card.row["error"]
    return f'<p class="problem"><code>{_text(error["code"])}</code> {_text(error["message"])}</p>\n' if error else ""


def _found(card: Card) -> str:
    """The masks by name; the largest few where there are many."""
    colours, names = card.colours(), _names(card)
    items = [
        f'<li style="--own:{_text(colours[mask_id])}"><i></i>{_text(names[mask_id])}</li>'
        for mask_id in list(colours)[:FOUND_MAX]
    ]
    if len(colours) > FOUND_MAX:
        items.append(f"<li>and {len(colours) - FOUND_MAX} more</li>")
    return f'<ul class="found">{"".join(items)}</ul>\n' if items else ""


def _links(card: Card) -> str:
    links = [f'<a href="{_text(file.name)}">{_text(file.name)}</a>' for file in card.files.values()]
    return f"<p>{' · '.join(links)}</p>" if links else ""


def _names(card: Card) -> dict[int, str]:
    labels = card.row["labels"] or ()
    return {int(label["id"]): f"{_name(label)}, {label['area']:,} px" for label in labels}


def _name(label: Object) -> str:
    """Of a mask its name and score, of a painted layer its colour and how much of it."""
    return f"{label['label']} {label['score']:.2f}" if "label" in label else f"{label['color']} at {label['opacity']:.0%}"


def in_words(params: Object, text: str | None) -> list[str]:
    """The task's question, a few words per part of it."""
    asked = pointed(params)
    words = [f'"{text}"'] if text else []
    words += [f"box {', '.join(f'{value:g}' for value in box)}" for box in asked.boxes]
    words += [f"{'+' if label else '−'} point {x:g}, {y:g}" for x, y, label in asked.points]
    words += [f"outline of {len(polygon)} corners" for polygon in asked.polygons]
    words += [f"{layer['color']} at {layer['opacity']:.0%}" for layer in params.get("layers", ())]
    words += ["the mask of an earlier task" for mask in _masks(params) if "task_id" in mask]
    words += [f"{name} {json.dumps(params[name])}" for name in params if name not in POINTING]
    return words or ["the photo alone"]


def pointed(params: Object) -> Pointed:
    """Everything that a task and its objects point with."""
    wanted = [params, *params.get("objects", ())]
    boxes = [box for each in wanted for box in (*each.get("boxes", ()), *([each["box"]] if "box" in each else ()))]
    points = [_point(point) for each in wanted for point in each.get("points", ())]
    polygons = [mask["polygon"] for mask in _masks(params) if "polygon" in mask]
    return Pointed(boxes, points, polygons)


def _masks(params: Object) -> list[Object]:
    """Every mask that a task names, as it was named."""
    single = [each["mask"] for name in ("objects", "layers") for each in params.get(name, ()) if "mask" in each]
    return [*single, *params.get("masks", ())]


def _point(point: Any) -> tuple[float, float, int]:
    if isinstance(point, Mapping):
        return point["x"], point["y"], point.get("label", 1)
    x, y, *label = point
    return x, y, label[0] if label else 1


def _path(annotation: Object) -> str:
    """COCO's flat polygons as an SVG path."""
    return "".join(f"M{' '.join(f'{value:g}' for value in ring)}Z" for ring in annotation["polygons"])


def _svg(photo: File, name: str, inside: str) -> str:
    width, height = _size(photo)
    return f'<svg class="{name}" viewBox="0 0 {width} {height}">{inside}</svg>'


def _size(photo: File) -> tuple[int, int]:
    with Image.open(io.BytesIO(photo.data)) as image:
        return image.size


def _json(card: Card) -> str:
    shown = {"id": card.row["id"], "kind": card.row["kind"], "params": card.params, "text_prompt": card.text}
    shown |= {name: card.row[name] for name in ("status", "error", "metadata", "labels")}
    return "\n".join(_lines(shown))


def _lines(shown: Object) -> Iterator[str]:
    """JSON with one line per label, which would fill pages with one line per number."""
    yield "{"
    for place, (name, value) in enumerate(shown.items()):
        text = json.dumps(value, ensure_ascii=False, indent=None if name == "params" else 2)
        if name == "labels" and value:
            text = "[\n" + ",\n".join(f"    {json.dumps(label, ensure_ascii=False)}" for label in value) + "\n  ]"
        elif "\n" in text:
            text = text.replace("\n", "\n  ")
        yield f"  {json.dumps(name)}: {text}{',' if place < len(shown) - 1 else ''}"
    yield "}"


def _text(value: object) -> str:
    return escape(str(value), quote=True)
