"""What a killed worker had finished is published by its successor, and only what it had not goes back, whichever the store."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from support.stores import Queue, new_id

from daemon.journal import Journal
from daemon.lease import succeed_the_dead
from daemon.spool import Spool
from storage.base import Fate, Outcome, Task

pytestmark = pytest.mark.anyio
MB = 1024 * 1024


def ends(tasks: tuple[Task, ...], fate: Fate = Fate.DONE, values: str = '{"masks_url": "mine"}') -> list[Outcome]:
    return [Outcome(task.id, task.token, fate, values if fate is Fate.DONE else "{}", "timeout", "slow") for task in tasks]


async def die(folder: Path, worker: str, outcomes: list[Outcome], begun: list[str]) -> None:
    """Leave on disk what a process leaves that is killed while the database is away."""
    journal = Journal(folder, worker, "db")
    journal.begin(1, begun)
    await Spool(folder, worker, "db", 1000, MB).keep(outcomes)
    text = (file := next(folder.glob("*.journal"))).read_text()
    journal.close()
    file.write_text(text)  # unlocked, as the kernel leaves it


async def test_finished_tasks_are_published_before_the_others_are_taken_back(queue: Queue, tmp_path: Path) -> None:
    await queue.insert(4)
    worker = new_id()
    await queue.beat(worker)
    done, failed, ran, waited = await queue.claim(worker)
    await die(tmp_path, worker, ends((done,)) + ends((failed,), Fate.FAILED), [done.id, failed.id, ran.id])

    await succeed_the_dead(queue.store, tmp_path, "db", 1)
    await succeed_the_dead(queue.store, tmp_path, "db", 1)

    rows = [await queue.row(task.id) for task in (done, failed, ran, waited)]
    assert [(row["status"], row["attempts"], row["deaths"]) for row in rows] == [
        ("done", 1, 0),
        ("error", 1, 0),  # its thread hung, and was named by the journal: it ended all the same
        ("pending", 0, 1),
        ("pending", 1, 0),
    ]
    assert rows[0]["masks_url"] == "mine"
    assert list(tmp_path.iterdir()) == []


async def test_what_others_have_taken_over_is_not_published_and_not_kept(queue: Queue, tmp_path: Path) -> None:
    await queue.insert()
    dead, living = new_id(), new_id()
    await queue.beat(dead)
    stale = await queue.claim(dead)
    await die(tmp_path, dead, ends(stale), [])
    await queue.silence(dead)
    await queue.steady(living)
    assert await queue.store.rescue(living, 600) == 1
    (fresh,) = await queue.claim(living)

    await succeed_the_dead(queue.store, tmp_path, "db", 500)

    row = await queue.row(fresh.id)
    assert (row["status"], str(row["claim_token"])) == ("processing", fresh.token)
    assert list(tmp_path.iterdir()) == []
    tombs = await queue.sql.fetch("select claim_token::text from maskd.tombstones")
    assert [tomb[0] for tomb in tombs] == [stale[0].token], "its blobs have a tombstone"


async def test_what_the_database_does_not_take_goes_back_and_its_neighbours_are_published(queue: Queue, tmp_path: Path) -> None:
    await queue.insert(5)
    worker = new_id()
    await queue.beat(worker)
    tasks = await queue.claim(worker)
    outcomes = ends(tasks)
    outcomes[2].values = '{"labels": "\\u0000"}'
    await die(tmp_path, worker, outcomes, [])
    await succeed_the_dead(queue.store, tmp_path, "db", 500)
    assert await queue.statuses() == {"done": 4, "pending": 1}


async def test_two_successors_at_once_publish_all_once_and_take_nothing_back(queue: Queue, tmp_path: Path) -> None:
    await queue.insert(3)
    worker = str(uuid.uuid4())
    await queue.beat(worker)
    tasks = await queue.claim(worker)
    await die(tmp_path, worker, ends(tasks), [])
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        for file in tmp_path.glob("*-*"):
            (folder / file.name).write_bytes(file.read_bytes())
        await succeed_the_dead(queue.store, folder, "db", 500)
    assert await queue.statuses() == {"done": 3}
    assert await queue.sql.fetchval("select count(*) from maskd.tombstones") == 0
