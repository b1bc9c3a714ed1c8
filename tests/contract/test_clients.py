"""The inserting side: the same tasks go in and come out by a database connection and over HTTP."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator

import anyio
import pytest
from support.database import Database
from support.postgrest import SERVICE_KEY, Faults, postgrest
from support.stores import Queue, new_id

from storage.base import ConfigurationError, RefusedError
from storage.client import Client, TaskClient
from storage.client_rpc import RpcClient

pytestmark = pytest.mark.anyio

KIND = "segment_visual"


@pytest.fixture
async def queue(database: Database) -> AsyncIterator[Queue]:
    opened = await Queue.open(database)
    yield opened
    await opened.close()


@pytest.fixture
def faults() -> Faults:
    return Faults()


@pytest.fixture(params=["asyncpg", "rpc"])
async def client(request: pytest.FixtureRequest, queue: Queue, database: Database, faults: Faults) -> AsyncIterator[Client]:
    """A client of each kind, on a database with one project."""
    if request.param == "asyncpg":
        made: Client = await TaskClient.connect(database.dsn)
        yield made
        await made.close()
        return
    with postgrest(database.dsn, faults) as server:
        made = await RpcClient.connect(server.url, SERVICE_KEY)
        yield made
        await made.close()


async def test_a_task_goes_in_as_it_was_asked_and_comes_out_as_it_ended(client: Client, queue: Queue) -> None:
    owner = await client.owner(None)
    assert owner == queue.owner
    key = f"uploads/{owner.user_id}/a.jpg"
    first = await client.insert(owner, KIND, key, {"boxes": [[1, 2, 3, 4]]}, "a cat", 3)
    child = await client.insert(owner, KIND, key, {}, after=first)
    (task,) = await queue.claim(new_id())
    assert (task.id, task.text_prompt, task.source_image_url) == (first, "a cat", key)
    assert task.params == '{"boxes": [[1, 2, 3, 4]]}'
    await queue.settle([task])
    done, waits = await client.rows([first, child, str(uuid.uuid4())])
    assert (done["status"], done["kind"], done["source_image_url"], waits["status"]) == ("done", KIND, key, "pending")
    assert done["seconds"] > 0
    assert [row["id"] for row in await client.finished([first], 5)] == [first]
    with pytest.raises(TimeoutError):
        await client.finished([child], 0)


async def test_both_clients_tell_a_row_alike(queue: Queue, database: Database) -> None:
    (task_id,) = await queue.insert()
    with postgrest(database.dsn) as server:
        remote = await RpcClient.connect(server.url, SERVICE_KEY)
        assert await remote.rows([task_id]) == await queue.client.rows([task_id])
        await remote.close()


async def test_failed_tasks_are_put_back_by_id_or_by_code(queue: Queue) -> None:
    ids = await queue.insert(3)
    fail = "update public.segmentation_results set status = 'error', error = jsonb_build_object('code', $2::text) where id = $1"
    for task_id, code in zip(ids, ("internal", "internal", "timeout"), strict=True):
        await queue.sql.execute(fail, task_id, code)
    assert await queue.retry([ids[2]], "internal", 10) == 0
    assert await queue.retry([ids[2]], None, 10) == 1
    assert await queue.retry(None, "internal", 1) == 1
    assert await queue.statuses() == {"pending": 2, "error": 1}


async def test_a_project_must_be_named_when_there_are_several_and_be_there(client: Client, queue: Queue) -> None:
    other = await queue.new_owner()
    with pytest.raises(ConfigurationError, match="--project"):
        await client.owner(None)
    assert await client.owner(other.project_id) == other
    with pytest.raises(ConfigurationError, match="no project"):
        await client.owner(str(uuid.uuid4()))


async def test_what_is_no_id_is_refused_in_a_sentence(client: Client) -> None:
    with pytest.raises(RefusedError):
        await client.rows(["7"])


async def test_a_task_whose_reply_was_lost_is_inserted_once(queue: Queue, database: Database, faults: Faults) -> None:
    with postgrest(database.dsn, faults) as server:
        client = await RpcClient.connect(server.url, SERVICE_KEY)
        faults.lose_replies["maskd_submit"] = 1
        await client.insert(queue.owner, KIND, f"uploads/{queue.owner.user_id}/a.jpg", {})
        assert faults.lost == 1
        assert await queue.statuses() == {"pending": 1}
        await client.close()


async def test_without_a_project_the_operator_is_told_to_make_one(database: Database) -> None:
    with postgrest(database.dsn) as server:
        client = await RpcClient.connect(server.url, SERVICE_KEY)
        with pytest.raises(ConfigurationError, match="no project yet"), anyio.fail_after(20):
            await client.owner(None)
        await client.close()
