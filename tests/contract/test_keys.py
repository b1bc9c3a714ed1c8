"""What an address means is decided twice: by the database when a row comes in, by the worker before it reads. They must agree."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from support.database import Database
from support.stores import Queue, new_id

from daemon.keys import Keys, bases_of
from handlers.base import RejectedError

pytestmark = pytest.mark.anyio

PREFIXES = ("uploads/u1/", "masks/p1/")
KEYS = Keys(bases_of("https://cdn.example/x", "https://acc.r2.example", "s3-images"), "https://cdn.example/x")

PLAIN = (
    "uploads/u1/cat.jpg",
    "masks/p1/t1/mask.png",
    "uploads/u1/a b.jpg",
    "uploads/u1/café.jpg",
    "uploads/u1/a?b#c.jpg",
    "uploads/u1/\u0085.jpg",
    "uploads/u1/..hidden/cat.jpg",
    "uploads/u1/" + "a" * 1013,
    "uploads/u1/" + "é" * 1014,
    "uploads/u1/",
    "uploads/u1/a%20b.jpg",
    "uploads/u1/../u2/cat.jpg",
    "uploads/u1/./cat.jpg",
    "uploads/u1//cat.jpg",
    "uploads/u1/..",
    "uploads/u1/a\nb.jpg",
    "uploads/u1/a\\b.jpg",
    "uploads/u2/cat.jpg",
    "/uploads/u1/cat.jpg",
    "x/uploads/u1/cat.jpg",
    "",
)
PATHS = (
    "uploads/u1/cat.jpg",
    "uploads/u1/cat.jpg?width=100#top",
    "uploads/u1/cat.jpg#top?width=100",
    "uploads/u1/cat%3Fa.jpg?b=%zz",
    "uploads%2Fu1%2Fcat.jpg",
    "uploads%2fu1%2fcat.jpg",
    "uploads/u1/a%20b%2Bc+d.jpg",
    "uploads/u1/caf%C3%A9.jpg",
    "uploads/u1/caf%c3%a9/café.jpg",
    "uploads/u1/%F0%9F%90%88.jpg",
    "%75ploads/u1/cat.jpg",
    "masks/p1/uploads/u1/cat.jpg",
    "uploads/u1/" + "%C3%A9" * 1013,
    "uploads/u1/" + "%C3%A9" * 1014,
    "uploads/u1/../u2/cat.jpg",
    "uploads/u1/%2e%2e/u2/cat.jpg",
    "uploads/u1/%2E%2E%2Fcat.jpg",
    "uploads/u1/%252e%252e/cat.jpg",
    "uploads/u1/a%2520b.jpg",
    "uploads/u1/%zz.jpg",
    "uploads/u1/cat%4",
    "uploads/u1/%00.jpg",
    "uploads/u1/%0A.jpg",
    "uploads/u1/%5Ccat.jpg",
    "uploads/u1//cat.jpg",
    "/uploads/u1/cat.jpg",
    "../uploads/u1/cat.jpg",
    "uploads/u2/cat.jpg",
    "uploads/u1/",
    "",
)
OWN = (*PLAIN, *(base + path for base in KEYS.bases for path in PATHS))
NOT_UTF8 = ("%ff", "%C3", "%C3é%A9", "%ED%A0%80", "%C0%AF")
FOREIGN = (
    "http://169.254.169.254/latest/meta-data",
    "https://cdn.example.evil/x/uploads/u2/cat.jpg",
    "https://evil%2Fuploads/u1/cat.jpg",
    "https://cdn.example",
    "s3://other",
    "s3://other/uploads/u2/cat.jpg",
    "ftp://cdn.example/uploads/u1/cat.jpg",
    "file:///uploads/u1/cat.jpg",
    "file:///etc/passwd",
)


async def test_at_our_own_addresses_the_database_accepts_what_a_worker_accepts_as_the_same_key(database: Database) -> None:
    keys = await in_sql(database, OWN, KEYS.bases)
    assert keys == in_python(OWN)
    assert {"uploads/u1/café.jpg", "uploads/u1/café/café.jpg", "uploads/u1/a b+c+d.jpg"} <= set(keys.values())


async def test_a_database_that_knows_no_address_of_ours_accepts_all_that_a_worker_accepts(database: Database) -> None:
    keys, wanted = await in_sql(database, OWN, ()), in_python(OWN)
    assert {address: keys[address] for address, key in wanted.items() if key is not None} == {
        address: key for address, key in wanted.items() if key is not None
    }


async def test_bases_without_a_slash_at_the_end_mean_the_same(database: Database) -> None:
    assert await in_sql(database, OWN, [base.rstrip("/") for base in KEYS.bases]) == in_python(OWN)


@pytest.mark.parametrize("bases", [(), KEYS.bases])
async def test_addresses_that_lead_to_no_prefix_are_refused_by_both(database: Database, bases: Sequence[str]) -> None:
    assert await in_sql(database, FOREIGN, bases) == in_python(FOREIGN) == dict.fromkeys(FOREIGN)


async def test_an_address_whose_bytes_are_not_utf_8_is_refused_when_the_row_comes_in(database: Database) -> None:
    addresses = [f"https://cdn.example/x/uploads/u1/{name}.jpg" for name in NOT_UTF8]
    assert await in_sql(database, addresses, KEYS.bases) == dict.fromkeys(addresses)


async def in_sql(database: Database, addresses: Sequence[str], bases: Sequence[str]) -> dict[str, str | None]:
    """What the database makes of each address when its settings name `bases`."""
    sql = await database.connect()
    await sql.execute("update maskd.settings set value = $1 where key = 'url_prefixes'", json.dumps(list(bases)))
    rows = await sql.fetch(
        "select a, maskd.key_of(a, $2::text[]) from unnest($1::text[]) a",
        list(addresses),
        list(PREFIXES),
    )
    await sql.close()
    return {row[0]: row[1] for row in rows}


def in_python(addresses: Sequence[str]) -> dict[str, str | None]:
    """What a worker makes of each address."""
    return {address: in_worker(address) for address in addresses}


def in_worker(address: str) -> str | None:
    try:
        return KEYS.key_of(address, PREFIXES)
    except RejectedError:
        return None


async def test_the_owner_of_a_project_is_told_and_nobody_of_none(queue: Queue) -> None:
    assert await queue.store.owner_of(queue.owner.project_id) == queue.owner.user_id
    assert await queue.store.owner_of(new_id()) is None
