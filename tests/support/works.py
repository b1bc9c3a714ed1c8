"""Works without a database: what the stages hand to each other."""

from __future__ import annotations

import uuid
from types import ModuleType, SimpleNamespace
from typing import Any, cast

from daemon.work import Work
from handlers.base import Handler
from storage.base import Task


def a_task(kind: str = "segment_visual", **changes: Any) -> Task:
    values: dict[str, Any] = {
        "id": str(uuid.uuid4()),
        "token": str(uuid.uuid4()),
        "kind": kind,
        "project_id": "p1",
        "user_id": "u1",
        "source_image_url": None,
        "text_prompt": None,
        "params": "{}",
        "attempts": 1,
        "max_attempts": 3,
        "deaths": 0,
        "waited_seconds": 0.0,
    }
    return Task(**{**values, **changes})


def a_work(kind: str = "segment_visual", **changes: Any) -> Work:
    return Work(a_task(kind, **changes), cast(Handler, SimpleNamespace(ROLES=frozenset())), "cpu")


def handler(**names: Any) -> Handler:
    """A handler made of functions."""
    module = ModuleType("kind")
    module.__dict__.update(names)
    return cast(Handler, module)
