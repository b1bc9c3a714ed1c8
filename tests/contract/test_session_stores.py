"""Where sessions live: in memory and in a real Redis alike they expire, are bounded, and give back what was put in."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.redis_server import redis_server

from storage.base import ConfigurationError, SessionsFullError, SessionStore, UnavailableError
from storage.memory import MemorySessions

pytestmark = pytest.mark.anyio
TTL_SECONDS = 600.0


@dataclass
class Stores:
    """One store of three entries and 100 bytes, and a way to let time pass for a session."""

    store: SessionStore
    idle: Callable[[str], Awaitable[None]]

    async def create(self, **parts: bytes) -> str:
        session_id = str(uuid.uuid4())
        await self.store.create(session_id, parts)
        return session_id


@pytest.fixture(scope="module")
def redis_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with redis_server(tmp_path_factory.mktemp("redis")) as url:
        yield url


@pytest.fixture(params=["memory", "redis"])
async def stores(request: pytest.FixtureRequest) -> AsyncIterator[Stores]:
    if request.param == "memory":
        now = [0.0]

        async def pass_by(session_id: str) -> None:
            now[0] += TTL_SECONDS

        yield Stores(MemorySessions(TTL_SECONDS, 3, 100, lambda: now[0]), pass_by)
        return
    from storage.redis import PREFIX, RedisSessions

    store = RedisSessions(request.getfixturevalue("redis_url"), TTL_SECONDS, 3, 100)

    async def expire(session_id: str) -> None:
        """The key goes, and the list of the living says that it should have: as after ten minutes."""
        assert 0 < await store._redis.pttl(f"{PREFIX}:{session_id}") <= TTL_SECONDS * 1000
        await store._redis.pexpire(f"{PREFIX}:{session_id}", 0)
        await store._redis.zadd(f"{PREFIX}s:live", {session_id: 1})

    yield Stores(store, expire)
    await store.drop_all()
    assert await store.count() == (0, 0)
    await store.close()


async def test_parts_come_back_as_they_were(stores: Stores) -> None:
    session_id = await stores.create(facts=b"{}", source=bytes(range(40)))
    assert await stores.store.read(session_id, "source") == bytes(range(40))
    assert await stores.store.read(session_id, "masks") is None
    assert await stores.store.count() == (1, 42)


async def test_a_part_is_added_and_replaced_and_counted(stores: Stores) -> None:
    session_id = await stores.create(facts=b"{}")
    assert await stores.store.write(session_id, "masks", b"12345")
    assert await stores.store.write(session_id, "masks", b"123")
    assert await stores.store.read(session_id, "masks") == b"123"
    assert await stores.store.count() == (1, 5)


async def test_an_unused_session_is_gone_and_gives_its_room_back(stores: Stores) -> None:
    session_id = await stores.create(facts=b"1234")
    await stores.idle(session_id)
    assert await stores.store.read(session_id, "facts") is None
    assert not await stores.store.write(session_id, "masks", b"1")
    assert not await stores.store.drop(session_id)
    assert await stores.store.count() == (0, 0)


async def test_dropping_says_whether_there_was_anything(stores: Stores) -> None:
    session_id = await stores.create(facts=b"1")
    assert [await stores.store.drop(session_id) for _ in range(2)] == [True, False]
    for _ in range(2):
        await stores.create(facts=b"1")
    assert [await stores.store.drop_all() for _ in range(2)] == [2, 0]


async def test_no_more_sessions_than_may_live(stores: Stores) -> None:
    first, *_ = [await stores.create(facts=b"1") for _ in range(3)]
    with pytest.raises(SessionsFullError) as full:
        await stores.create(facts=b"1")
    assert 0 < full.value.retry_seconds <= TTL_SECONDS
    await stores.store.drop(first)
    await stores.create(facts=b"1")


async def test_no_more_bytes_than_may_be_held(stores: Stores) -> None:
    session_id = await stores.create(source=bytes(60))
    with pytest.raises(SessionsFullError):
        await stores.create(source=bytes(41))
    with pytest.raises(SessionsFullError):
        await stores.store.write(session_id, "masks", bytes(41))
    assert await stores.store.write(session_id, "masks", bytes(40))
    assert await stores.store.count() == (1, 100)
    await stores.idle(session_id)
    await stores.create(source=bytes(100))


async def test_what_somebody_else_put_in_a_sessions_place_is_none(redis_url: str) -> None:
    from storage.redis import PREFIX, RedisSessions

    store = RedisSessions(redis_url, TTL_SECONDS, 3, 100)
    session_id = str(uuid.uuid4())
    await store._redis.set(f"{PREFIX}:{session_id}", b"a string")
    assert await store.read(session_id, "facts") is None
    await store._redis.delete(f"{PREFIX}:{session_id}")
    await store.drop_all()
    await store.close()


async def test_a_redis_that_is_not_there_is_unavailable_in_time(tmp_path: Path) -> None:
    pytest.importorskip("redis", reason="needs the extra [redis]")
    from storage.redis import RedisSessions

    store = RedisSessions(f"unix://{tmp_path}/nothing.sock", TTL_SECONDS, 3, 100, timeout_seconds=2)
    with pytest.raises(UnavailableError):
        await store.open()
    await store.close()


async def test_a_url_of_another_kind_is_a_mistake_of_configuration() -> None:
    pytest.importorskip("redis", reason="needs the extra [redis]")
    from storage.redis import RedisSessions

    with pytest.raises(ConfigurationError, match="MASKD_REDIS_URL is not understood"):
        RedisSessions("http://hidden-word@host", TTL_SECONDS, 3, 100)
