"""What must hold once all is quiet again. Each check answers with its violations; a violation names its row.

Pure but for `blobs_of`, which reads every blob that a row names.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from chaos.history import FINAL, History, ends
from chaos.load import Asked, User, blameless
from PIL import Image

from storage.base import BlobStore, MissingBlobError

URLS = ("mask_image_url", "masks_url", "result_image_url")
NAMED = {
    "segment_visual": {"mask_image_url", "masks_url"},
    "segment_everything": {"mask_image_url", "masks_url"},
    "remove_object": set(URLS),
    "paint_masks": {"result_image_url"},
    "convert_image": {"result_image_url"},
}
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Violation:
    """What does not hold, and of which row."""

    sentence: str
    task: str | None = None


def ended_once(asked: Mapping[str, Asked], history: History) -> Iterator[Violation]:
    """Every task that was sent has ended, once, and nothing was changed after that."""
    for task in asked:
        entries = ends(history.get(task, ()))
        if not entries:
            yield Violation("lost: it never ended", task)
        elif len(entries) > 1:
            yield Violation(f"duplicate: it ended as {' and then '.join(entry.status for entry in entries)}", task)


def ended_rightly(asked: Mapping[str, Asked], rows: Mapping[str, Row]) -> Iterator[Violation]:
    """Nothing that was in order failed: only what was wrong by itself, or waited for something that failed or was cancelled."""
    for task in (each for each in asked.values() if each.id in rows):
        status, code = rows[task.id]["status"], (rows[task.id]["error"] or {}).get("code")
        parent = rows.get(task.after or "")
        excused = status == "canceled" or (code == "after_failed" and parent is not None and parent["status"] != "done")
        if status in FINAL and not excused and code != task.fault:
            yield Violation(f"it ended as {status} {code}, and should have as {task.fault or 'done'}", task.id)
        if status == "done" and not blameless(asked, task):
            yield Violation("it is done, though what it needs is missing", task.id)


def blobs_of(asked: Mapping[str, Asked], rows: Mapping[str, Row], blobs: BlobStore) -> Iterator[Violation]:
    """A row in `done` names what its kind makes, of one attempt, its own, and all of it can be read."""
    for task in (each for each in asked.values() if each.id in rows):
        row = rows[task.id]
        named = {column: row[column] for column in URLS if row[column]}
        if row["status"] != "done":
            if named:
                yield Violation(f"it ended as {row['status']} and names {sorted(named)}", task.id)
            continue
        if set(named) != NAMED[task.kind]:
            yield Violation(f"it names {sorted(named)}, and {task.kind} makes {sorted(NAMED[task.kind])}", task.id)
        for column, key in named.items():
            if not key.startswith(f"masks/{task.user.project}/{task.id}/{row['token']}/"):
                yield Violation(f"{column} {key} is of another attempt", task.id)
            elif fault := _unreadable(blobs, key):
                yield Violation(f"{column} {key} {fault}", task.id)


def orphans(rows: Mapping[str, Row], stored: Sequence[str]) -> Iterator[Violation]:
    """After the sweep nothing is stored that no row names."""
    published = {row[column] for row in rows.values() for column in URLS if row[column]}
    for key in sorted(set(stored) - published):
        yield Violation(f"orphan: {key}", key.split("/")[2])


def credits_add_up(
    users: Sequence[User], rows: Mapping[str, Row], profiles: Mapping[str, int], uses: Mapping[str, int]
) -> Iterator[Violation]:
    """Per user: what is left and what rows hold is what there was; the log of uses says the same; what failed holds nothing."""
    for user in users:
        held = sum(row["charged"] for row in rows.values() if row["project"] == user.project)
        if profiles[user.id] + held != user.credits or profiles[user.id] < 0:
            yield Violation(f"credits of {user.id}: {profiles[user.id]} left and {held} charged of {user.credits}")
        if uses.get(user.id, 0) != held:
            yield Violation(f"credits of {user.id}: {held} charged, and the log says {uses.get(user.id, 0)}")
    for task, row in rows.items():
        if row["status"] == "error" and row["charged"]:
            yield Violation(f"it failed and was not refunded {row['charged']}", task)


def _unreadable(blobs: BlobStore, key: str) -> str | None:
    try:
        data = blobs.get(key, 10_000_000)
        if key.endswith(".json"):
            json.loads(data)
        else:
            Image.open(io.BytesIO(data)).load()
    except MissingBlobError:
        return "does not exist"
    except (OSError, ValueError) as error:
        return f"cannot be read: {error}"
    return None
