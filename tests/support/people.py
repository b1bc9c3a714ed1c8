"""Users of the database in a test, and what PostgREST does with their tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import asyncpg


@dataclass(frozen=True, slots=True)
class Person:
    """A user with a project; ids as text."""

    id: str
    project: str

    @property
    def image(self) -> str:
        """A key that this user may name."""
        return f"uploads/{self.id}/a.jpg"


async def person(sql: asyncpg.Connection[Any], credits: int | None = None, tier: str = "free") -> Person:
    """Sign somebody up, with a profile when `credits` are given, and make a project."""
    user = await sql.fetchval("insert into auth.users default values returning id::text")
    if credits is not None:
        await sql.execute("insert into public.users_profile (id, credits, tier) values ($1, $2, $3)", user, credits, tier)
    return Person(user, await sql.fetchval("insert into public.projects (user_id) values ($1) returning id::text", user))


async def as_user(sql: asyncpg.Connection[Any], user: str, query: str, *arguments: Any) -> list[asyncpg.Record]:
    """What PostgREST does with a user's token: a transaction with the user's role and claims. `user` is an id."""
    return await as_role(sql, "authenticated", {"sub": user, "role": "authenticated"}, query, *arguments)


async def as_role(
    sql: asyncpg.Connection[Any], role: str, claims: dict[str, str], query: str, *arguments: Any
) -> list[asyncpg.Record]:
    """The same for any role and claims."""
    async with sql.transaction():
        await sql.execute(f"set local role {role}")
        await sql.execute("select set_config('request.jwt.claims', $1, true)", json.dumps(claims))
        return await sql.fetch(query, *arguments)


async def create(sql: asyncpg.Connection[Any], who: Person, kind: str = "segment_visual", **asked: Any) -> dict[str, Any]:
    """`create_segmentation` by this user: its answer."""
    asked = {"project_id": who.project, "kind": kind, "source_image_url": who.image, **asked}
    casts = {"project_id": "::text::uuid", "after": "::text::uuid", "params": "::text::jsonb"}
    values = [json.dumps(value) if name == "params" else value for name, value in asked.items()]
    named = ", ".join(f"{name} => ${place}{casts.get(name, '')}" for place, name in enumerate(asked, 1))
    (row,) = await as_user(sql, who.id, f"select public.create_segmentation({named})", *values)
    return dict(json.loads(row[0]))


async def cancel(sql: asyncpg.Connection[Any], who: Person, task_id: str) -> dict[str, Any]:
    """`cancel_segmentation` by this user: its answer."""
    (row,) = await as_user(sql, who.id, "select public.cancel_segmentation($1::text::uuid)", task_id)
    return dict(json.loads(row[0]))


async def credits(sql: asyncpg.Connection[Any], who: Person) -> int:
    return int(await sql.fetchval("select credits from public.users_profile where id = $1", who.id))


async def used(sql: asyncpg.Connection[Any], who: Person) -> list[tuple[str, int]]:
    """The usage log of this user, oldest first: action and credits."""
    rows = await sql.fetch(
        "select action, credits_used from public.usage_logs where user_id = $1 order by created_at, credits_used desc", who.id
    )
    return [(row[0], row[1]) for row in rows]
