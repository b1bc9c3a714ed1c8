"""What users do during an episode: bursts of tasks of several kinds, paid and unpaid, chains, mistakes, cancels.

Every id is chosen here, so that what was asked is known even where an answer was lost.
"""

from __future__ import annotations

import io
import json
import random
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import psycopg
from chaos.ground import Tables
from PIL import Image

from storage.base import BlobStore

SIZE = (48, 32)
BOX = [4, 4, 40, 28]
CREDITS = {"rich": 100_000, "poor": 15}
TIERS = ("free", "pro", "enterprise")
INSERT = """insert into public.segmentation_results (id, project_id, kind, source_image_url, params, after)
  select (r ->> 'id')::uuid, (r ->> 'project')::uuid, r ->> 'kind', r ->> 'image', r -> 'params', (r ->> 'after')::uuid
  from jsonb_array_elements(%s::jsonb) r on conflict (id) do nothing returning id"""
AS_SERVICE = INSERT.replace("params, after)", "params, after, priority, charged)").replace(
    "'after')::uuid\n", "'after')::uuid, (r ->> 'priority')::smallint, (r ->> 'charged')::int\n"
)


@dataclass(frozen=True, slots=True)
class User:
    """Somebody with one project, one photo and so many credits at the start."""

    id: str
    project: str
    credits: int

    @property
    def photo(self) -> str:
        return f"uploads/{self.id}/photo.png"


@dataclass(frozen=True, slots=True)
class Asked:
    """A task as it was sent. `fault` is the error code that it deserves by itself, if any."""

    id: str
    user: User
    kind: str
    image: str | None
    params: Mapping[str, Any]
    after: str | None = None
    fault: str | None = None
    priority: int | None = None
    charged: int = 0


class Load:
    """The users of one episode, and all that they asked."""

    def __init__(self, tables: Tables, blobs: BlobStore) -> None:
        self._tables = tables
        self.users = [self._user(tier, CREDITS["poor" if number == 2 else "rich"]) for number, tier in enumerate(TIERS)]
        self.asked: dict[str, Asked] = {}
        for user in self.users:
            picture = io.BytesIO()
            Image.new("RGB", SIZE, (200, 120, 40)).save(picture, "PNG")
            blobs.put(user.photo, picture.getvalue(), "image/png")

    def burst(self, dice: random.Random, count: int, paid: bool) -> None:
        """So many tasks, chains among them, in one statement; a user who lacks the credits gets none of them."""
        user = dice.choice(self.users)
        rows: list[Asked] = []
        while len(rows) < count:
            rows += _chain(dice, user) if dice.random() < 0.25 else [_single(dice, user)]
        values = json.dumps([_row(asked, dice) for asked in rows])
        try:
            made = self._tables.ask(INSERT if paid else AS_SERVICE, values, user=user.id if paid else None)
        except psycopg.DatabaseError as error:
            if error.sqlstate != "PT402":
                raise
            return
        assert len(made) in (len(rows), 0)
        self.asked |= {asked.id: asked for asked in rows}

    def cancel(self, dice: random.Random, count: int) -> None:
        """Users cancel tasks that are not over yet."""
        live = self._tables.ask(
            """select id::text, user_id::text as user from public.segmentation_results
               where id = any (%s) and status in ('waiting', 'delayed', 'pending', 'processing')""",
            list(self.asked),
        )
        for row in dice.sample(live, min(count, len(live))):
            self._tables.ask("select public.cancel_segmentation(%s)", row["id"], user=row["user"])

    def _user(self, tier: str, credits: int) -> User:
        user = self._tables.one("insert into auth.users (email) values (gen_random_uuid() || '@localhost') returning id::text")
        self._tables.ask("insert into public.users_profile (id, tier, credits) values (%s, %s, %s)", user, tier, credits)
        project = self._tables.one("insert into public.projects (user_id, name) values (%s, 'chaos') returning id::text", user)
        return User(user, project, credits)


def blameless(asked: Mapping[str, Asked], task: Asked) -> bool:
    """Whether nothing is wrong with a task, nor with those before it."""
    return task.fault is None and (task.after is None or blameless(asked, asked[task.after]))


def _single(dice: random.Random, user: User) -> Asked:
    photo, some = user.photo, str(uuid.UUID(int=dice.getrandbits(128), version=4))
    params: Mapping[str, Any] = {"boxes": [BOX]}
    match dice.choices(("visual", "everything", "convert", "remove", "missing", "invalid"), (35, 20, 20, 15, 5, 5))[0]:
        case "visual":
            return Asked(some, user, "segment_visual", photo, params)
        case "everything":
            return Asked(some, user, "segment_everything", photo, {"points_per_side": 4})
        case "convert":
            return Asked(some, user, "convert_image", photo, {"format": "WEBP", "max_side": 16})
        case "remove":
            return Asked(some, user, "remove_object", photo, params)
        case "missing":
            return Asked(some, user, "convert_image", f"uploads/{user.id}/nothing.png", {}, fault="image_missing")
        case _:
            return Asked(some, user, "segment_visual", photo, {"boxes": "none"}, fault="params_invalid")


def _chain(dice: random.Random, user: User) -> list[Asked]:
    """A mask, what is painted with it, and that in another format."""
    first, second, third = (str(uuid.UUID(int=dice.getrandbits(128), version=4)) for _ in range(3))
    return [
        Asked(first, user, "segment_visual", user.photo, {"boxes": [BOX]}),
        Asked(second, user, "paint_masks", None, {"layers": [{"mask": {"task_id": first}}]}, after=first),
        Asked(third, user, "convert_image", None, {"format": "PNG"}, after=second),
    ]


def _row(asked: Asked, dice: random.Random) -> dict[str, Any]:
    return {
        "id": asked.id,
        "project": asked.user.project,
        "kind": asked.kind,
        "image": asked.image,
        "params": asked.params,
        "after": asked.after,
        "priority": dice.choice((None, 0, 5, 20)),
        "charged": dice.choice((0, 1)),
    }
