"""Rows that ask for what cannot be: each ends with its code and a sentence, and good rows beside it are served."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from support.daemons import running
from support.pictures import flag, jpeg, png, saved
from support.site import PHOTO, PHOTO_BOX, Site

GOOD = {"boxes": [PHOTO_BOX]}
BYTES_MAX = 100_000
FILES = {
    "text.jpg": b"this is no image",
    "empty.png": b"",
    "cut.jpg": PHOTO.read_bytes()[:9_000],
    "bomb.png": png(30_000, 30_000),
    "bomb.jpg": jpeg(30_000, 30_000),
    "fat.bmp": saved(flag(400, 300), "BMP"),
}


def test_each_bad_row_ends_with_its_code_and_a_sentence_while_its_neighbours_are_done(site: Site, tmp_path: Path) -> None:
    wishes = {**bad_files(site), **bad_addresses(site), **bad_params(site)}
    settings = site.settings(MASKD_IMAGE_BYTES_MAX=str(BYTES_MAX), MASKD_RETRY_SECONDS="0.2")
    ids: dict[str, str] = {}
    good = []
    for name, (_, kind, key, params) in wishes.items():
        (ids[name],) = site.queue.insert(kind, params, key)
        good += site.queue.insert("segment_visual", GOOD, site.photo) if len(ids) % 4 == 0 else []

    with running(settings, tmp_path) as daemon:
        rows = dict(zip(ids, site.queue.finished(list(ids.values())), strict=True))
        neighbours = site.queue.finished(good)
        assert daemon.stop() == 0

    assert {name: row["error"] and row["error"]["code"] for name, row in rows.items()} == {
        name: code for name, (code, *_) in wishes.items()
    }
    assert {row["status"] for row in rows.values()} == {"error"}
    for name, row in rows.items():
        assert is_sentence(row["error"]["message"]), f"{name}: {row['error']['message']}"
    assert {(row["status"], row["attempts"]) for row in neighbours} == {("done", 1)}
    assert "multimask" in rows["misspelt"]["error"]["message"]
    assert site.stored() == site.published()
    assert daemon.events("task.failed") == []


def test_an_image_that_became_bad_after_the_insert_is_still_refused_by_the_worker(site: Site, tmp_path: Path) -> None:
    """The checks of the insert are repeated by the worker: here a trusted hand writes past them."""
    stranger, _ = site.queue.owner()
    ids = site.queue.insert("segment_visual", GOOD, site.photo, count=3)
    wishes = (f"uploads/{stranger}/cat.jpg", "http://169.254.169.254/latest/meta-data", "file:///etc/passwd")
    for task_id, address in zip(ids, wishes, strict=True):
        site.queue.ask("update public.segmentation_results set source_image_url = %s where id = %s", address, task_id)
    array = site.queue.insert("segment_visual", GOOD, site.photo)
    site.queue.ask("update public.segmentation_results set params = '[1]' where id = %s", array[0])

    with running(site.settings(), tmp_path):
        rows = site.queue.finished([*ids, *array])

    assert [row["error"]["code"] for row in rows] == ["image_url_forbidden"] * 3 + ["params_invalid"]


Wish = tuple[str, str, str | None, Any]


def bad_files(site: Site) -> Mapping[str, Wish]:
    """Uploads that are no image one can use."""
    folder = f"uploads/{site.queue.user}"
    for name, data in FILES.items():
        site.blobs.put(f"{folder}/{name}", data, "image/jpeg")
    codes = dict.fromkeys(FILES, "image_invalid") | dict.fromkeys(("bomb.png", "bomb.jpg", "fat.bmp"), "image_too_large")
    return {name: (codes[name], "segment_visual", f"{folder}/{name}", GOOD) for name in FILES}


def bad_addresses(site: Site) -> Mapping[str, Wish]:
    """Addresses that lead elsewhere, or nowhere."""
    folder = f"uploads/{site.queue.user}"
    stranger, project = site.queue.owner()
    site.blobs.put(f"uploads/{stranger}/cat.jpg", PHOTO.read_bytes(), "image/jpeg")
    forbidden = {
        "parent": f"{folder}/../{stranger}/cat.jpg",
        "absolute": "/etc/passwd",
        "http": "http://example.com/cat.jpg",
        "https with our path": f"https://example.com/{folder}/cat.jpg",
        "file": "file:///etc/passwd",
        "metadata": "http://169.254.169.254/latest/meta-data/iam",
        "metadata with our path": f"http://169.254.169.254/{folder}/cat.jpg",
        "another's upload": f"uploads/{stranger}/cat.jpg",
        "another's mask": f"masks/{project}/x/mask.png",
        "encoded": f"{folder}/%2e%2e/%2e%2e/secret.jpg",
        "backslash": f"{folder}\\..\\cat.jpg",
    }
    missing = {
        "no such key": ("image_missing", "segment_visual", f"{folder}/nowhere.jpg", GOOD),
        "no address": ("image_missing", "segment_visual", None, GOOD),
    }
    return {name: ("image_url_forbidden", "segment_visual", key, GOOD) for name, key in forbidden.items()} | missing


def bad_params(site: Site) -> Mapping[str, Wish]:
    """Wishes that make no sense."""
    kinds = {"unknown kind": ("kind_unknown", "segment_visuals", site.photo, GOOD)}
    outside = {
        "box outside": {"boxes": [[5000, 5000, 5100, 5100]]},
        "point outside": {"points": [[5000, 10]]},
        "negative point": {"points": [{"x": -20, "y": 10}]},
        "nothing": {},
    }
    senseless = {
        "misspelt": {"boxes": [PHOTO_BOX], "multimsk": True},
        "array": [1, 2, 3],
        "text": '"boxes"',
        "number": "7",
        "not a number": {"boxes": [["NaN", 0, 10, 10]]},
        "endless": {"boxes": [["Infinity", 0, 10, 10]]},
        "beyond a float": '{"boxes": [[1e400, 0, 10, 10]]}',
        "words": {"boxes": [["a", "b", "c", "d"]]},
        "three numbers": {"boxes": [[1, 2, 3]]},
        "too many points": {"points": [[1, 1]] * 300},
        "too large": {"boxes": [[1, 2, 3, 4]] * 10_000},
        "many digits": '{"boxes": [[1' + "0" * 5000 + ", 0, 10, 10]]}",
        "half as deep": '{"objects": ' + "[" * 700 + "]" * 700 + "}",
        "deep": '{"objects": ' + "[" * 1500 + "]" * 1500 + "}",
    }
    return (
        kinds
        | {name: ("prompt_invalid", "segment_visual", site.photo, params) for name, params in outside.items()}
        | {name: ("params_invalid", "segment_visual", site.photo, params) for name, params in senseless.items()}
    )


def is_sentence(message: str) -> bool:
    """A person can read it: some words and an end, and nothing of the program's insides."""
    inside = ("Traceback", "Error", "Exception", "storage.", "daemon.", "/tmp/", "pydantic", "NoneType", "\n")
    return 20 < len(message) < 1000 and message.endswith((".", "?")) and not any(word in message for word in inside)
