"""The gallery page: everything that was asked and found is on it, texts are shown as they are, and nothing is loaded."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from typing import Any

import pytest
from PIL import Image

from daemon.gallery import Card, File, in_words, page, pointed

EVIL = "<script>alert('x')</script> & \"quoted\""
SQUARE = [10.5, 10.5, 40.5, 10.5, 40.5, 40.5, 10.5, 40.5]


def image_file(name: str, form: str = "JPEG", size_wh: tuple[int, int] = (60, 50)) -> File:
    sink = io.BytesIO()
    Image.new("RGB", size_wh, (200, 120, 40)).save(sink, form)
    return File(name, f"image/{form.lower()}", sink.getvalue())


def label(mask_id: int, color: str | None = "#2196FF", name: str = "cat") -> dict[str, Any]:
    return {"id": mask_id, "label": name, "score": 0.5, "box": [10, 10, 41, 41], "area": 961, "color": color, "object": 0}


def row(**changed: Any) -> dict[str, Any]:
    facts = {"engine": "classical", "device": "cpu", "count": 1}
    found = {
        "id": "4f1c",
        "kind": "segment_visual",
        "status": "done",
        "seconds": 0.5,
        "labels": [label(1)],
        "metadata": facts,
        "error": None,
    }
    return {**found, **changed}


def files(count: int = 1) -> dict[str, File]:
    annotations = [{"id": index + 1, "area": 961, "score": 0.5, "polygons": [SQUARE]} for index in range(count)]
    dataset = json.dumps({"annotations": annotations}).encode()
    return {"mask_image_url": image_file("01-mask.png", "PNG"), "masks_url": File("01-masks.json", "application/json", dataset)}


def card(**changed: Any) -> Card:
    asked = {"points": [[20, 20]], "boxes": [[5, 5, 45, 45]]}
    values = {"title": "A cat", "photo": image_file("cat.jpg"), "params": asked, "text": "cat", "row": row(), "files": files()}
    return Card(**{**values, **changed})


class Loaded(HTMLParser):
    """Collects every address that a browser would load, and whether scripts run."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []
        self.tags: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.addresses += [
            value or "" for name, value in attrs if name in ("src", "srcset", "poster") or (name == "href" and tag != "a")
        ]


def parsed(html: str) -> Loaded:
    found = Loaded()
    found.feed(html)
    return found


@pytest.mark.parametrize(
    "hostile",
    [
        card(title=EVIL),
        card(text=EVIL),
        card(params={EVIL: EVIL}),
        card(row=row(labels=[label(1, name=EVIL)])),
        card(row=row(labels=[label(1, color=EVIL)])),
        card(row=row(kind=EVIL, status=EVIL)),
        card(row=row(metadata={"engine": EVIL, "device": EVIL})),
        card(row=row(status="error", labels=None, metadata=None, error={"code": EVIL, "message": EVIL}), files={}),
        card(files={**files(), "result_image_url": File(EVIL, "image/png", image_file("x", "PNG").data)}),
    ],
)
def test_a_text_of_a_row_is_shown_and_never_becomes_markup(hostile: Card) -> None:
    html = page([hostile], 1.0)
    assert "<script" not in html
    assert "script" not in parsed(html).tags
    assert "&lt;script&gt;" in html


def test_the_page_loads_nothing_but_what_it_holds() -> None:
    html = page([card(), card(files={**files(), "result_image_url": image_file("01-result.png", "PNG")})], 1.0)
    addresses = parsed(html).addresses + re.findall(r"url\(([^)]*)\)", html)
    assert addresses
    assert all(address.startswith("data:image/") for address in addresses)
    assert "@import" not in html


def test_a_task_shows_its_photo_its_mask_image_its_outline_and_its_prompts() -> None:
    shown = card()
    html = page([shown], 1.0)
    assert f'src="{shown.photo.inline()}"' in html
    assert f'<img class="mask" src="{shown.files["mask_image_url"].inline()}"' in html
    assert 'd="M10.5 10.5 40.5 10.5 40.5 40.5 10.5 40.5Z"' in html
    assert '<circle class="yes" cx="20" cy="20"' in html
    assert 'points="5,5 45,5 45,45 5,45"' in html


def test_an_error_shows_its_code_and_sentence_over_the_photo() -> None:
    error = {"code": "prompt_invalid", "message": "The point lies outside."}
    html = page([card(row=row(status="error", labels=None, metadata=None, error=error, seconds=None), files={})], 1.0)
    assert "<code>prompt_invalid</code> The point lies outside." in html
    assert "<img" in html


def test_every_answer_to_one_prompt_is_shown_best_first() -> None:
    labels = [label(1), label(2, color=None), label(3, color=None)]
    html = page([card(row=row(labels=labels), files=files(3))], 1.0)
    assert html.count("<figcaption>") == 3
    assert html.index("best, 0.50") < html.index("<figcaption>0.50")


def test_a_painted_result_takes_the_place_of_photo_and_mask() -> None:
    result = image_file("01-result.png", "PNG")
    html = page([card(files={**files(), "result_image_url": result})], 1.0)
    assert f'src="{result.inline()}"' in html
    assert '<img class="mask"' not in html


def test_a_photo_of_many_tasks_is_a_background_once() -> None:
    photo = image_file("cat.jpg")
    assert page([card(photo=photo)] * 5, 1.0).count("background-image: url(") == 1


def test_prompts_of_objects_are_found_in_every_spelling() -> None:
    asked = pointed(
        {
            "objects": [
                {"points": [[1, 2, 0], {"x": 3, "y": 4}]},
                {"box": [1, 2, 3, 4]},
                {"mask": {"polygon": [[0, 0], [9, 0], [9, 9]]}},
            ]
        }
    )
    assert asked.points == [(1, 2, 0), (3, 4, 1)]
    assert asked.boxes == [[1, 2, 3, 4]]
    assert asked.polygons == [[[0, 0], [9, 0], [9, 9]]]


def test_what_was_asked_is_said_in_words() -> None:
    words = in_words({"points": [[290, 150], {"x": 5, "y": 6, "label": 0}], "multimask": True}, "cup")
    assert words == ['"cup"', "+ point 290, 150", "− point 5, 6", "multimask true"]
    assert in_words({}, None) == ["the photo alone"]
