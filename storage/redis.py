"""SessionStore in Redis (extra [redis]), so that any daemon behind a balancer answers any session. Bytes only.

Enters: MASKD_REDIS_URL. Leaves: parts as bytes. Each call is one script, which Redis runs as a whole; times are Redis's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import redis.asyncio
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, NoPermissionError, RedisError, ResponseError

from storage.base import ConfigurationError, SessionsFullError, UnavailableError

PREFIX = "{maskd}:session"
"""In braces what a cluster hashes: all keys lie together."""

COMMON = """
local prefix = KEYS[1]
local live, sizes, total = prefix .. 's:live', prefix .. 's:sizes', prefix .. 's:bytes'
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local function remove(id)
  local size = redis.call('HGET', sizes, id)
  if size then redis.call('DECRBY', total, size) end
  redis.call('HDEL', sizes, id)
  redis.call('ZREM', live, id)
  return redis.call('DEL', prefix .. ':' .. id) > 0
end
for _, id in ipairs(redis.call('ZRANGEBYSCORE', live, '-inf', now)) do remove(id) end
local function full()
  local first = redis.call('ZRANGE', live, 0, 0, 'WITHSCORES')
  return {'full', first[2] and math.max(first[2] - now, 0) or tonumber(ARGV[1])}
end
local function lives(id)
  redis.call('ZADD', live, now + ARGV[1], id)
  redis.call('PEXPIRE', prefix .. ':' .. id, ARGV[1])
end
local function fits(size)
  return size <= 0 or tonumber(redis.call('GET', total) or 0) + size <= tonumber(ARGV[2])
end
"""
"""Keys: the prefix. Arguments: milliseconds to live, most bytes, most sessions, then the call's own."""

CREATE = """
local id, size = ARGV[4], 0
for at = 6, #ARGV, 2 do size = size + #ARGV[at] end
if redis.call('ZCARD', live) >= tonumber(ARGV[3]) or not fits(size) then return full() end
for at = 5, #ARGV, 2 do redis.call('HSET', prefix .. ':' .. id, ARGV[at], ARGV[at + 1]) end
redis.call('HSET', sizes, id, size)
redis.call('INCRBY', total, size)
lives(id)
return {'done'}
"""
READ = """
local key = prefix .. ':' .. ARGV[4]
if redis.call('EXISTS', key) == 0 then remove(ARGV[4]) return false end
lives(ARGV[4])
return redis.call('HGET', key, ARGV[5])
"""
WRITE = """
local id, part, data = ARGV[4], ARGV[5], ARGV[6]
local key = prefix .. ':' .. id
if redis.call('EXISTS', key) == 0 then remove(id) return {'gone'} end
lives(id)
local more = #data - redis.call('HSTRLEN', key, part)
if not fits(more) then return full() end
redis.call('HSET', key, part, data)
redis.call('HINCRBY', sizes, id, more)
redis.call('INCRBY', total, more)
return {'done'}
"""
DROP = "return remove(ARGV[4]) and 1 or 0"
DROP_ALL = """
local count = 0
for _, id in ipairs(redis.call('ZRANGE', live, 0, -1)) do if remove(id) then count = count + 1 end end
return count
"""
COUNT = "return {redis.call('ZCARD', live), tonumber(redis.call('GET', total) or 0)}"


class RedisSessions:
    """A few connections to one Redis. The bounds hold for all daemons on it together."""

    name = "redis"

    def __init__(
        self,
        url: str,
        ttl_seconds: float,
        sessions_max: int,
        bytes_max: int,
        *,
        timeout_seconds: float = 5.0,
        connections: int = 16,
    ) -> None:
        self._bounds = (int(ttl_seconds * 1000), bytes_max, sessions_max)
        self._timeout = timeout_seconds
        try:
            self._redis = redis.asyncio.Redis.from_url(
                url,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                max_connections=connections,
                retry=Retry(NoBackoff(), 1),  # a connection that the server has dropped is made anew, once
            )
        except ValueError as error:
            raise ConfigurationError(
                "MASKD_REDIS_URL is not understood: it begins with redis://, rediss:// or unix://"
            ) from error
        self._turns = asyncio.Semaphore(connections)
        scripts = {"create": CREATE, "read": READ, "write": WRITE, "drop": DROP, "drop_all": DROP_ALL, "count": COUNT}
        self._scripts = {name: self._redis.register_script(COMMON + script) for name, script in scripts.items()}

    async def open(self) -> None:
        await self._call("count")

    async def close(self) -> None:
        await self._redis.aclose()

    async def create(self, session_id: str, parts: Mapping[str, bytes]) -> None:
        given = [value for part in parts.items() for value in part]
        self._done(await self._call("create", session_id, *given))

    async def read(self, session_id: str, part: str) -> bytes | None:
        try:
            data: bytes | None = await self._call("read", session_id, part)
        except UnavailableError as error:
            if isinstance(error.__cause__, ResponseError) and "WRONGTYPE" in str(error.__cause__):
                return None  # what lies under that key is nobody's session
            raise
        return data

    async def write(self, session_id: str, part: str, data: bytes) -> bool:
        return self._done(await self._call("write", session_id, part, data))

    async def drop(self, session_id: str) -> bool:
        return bool(await self._call("drop", session_id))

    async def drop_all(self) -> int:
        return int(await self._call("drop_all"))

    async def count(self) -> tuple[int, int]:
        sessions, size = await self._call("count")
        return int(sessions), int(size)

    @staticmethod
    def _done(answer: list[Any]) -> bool:
        if answer[0] == b"full":
            raise SessionsFullError(int(answer[1]) / 1000)
        return bool(answer[0] == b"done")

    async def _call(self, script: str, *args: Any) -> Any:
        """The answer of a script; messages carry no URL, since that may hold a password."""
        try:
            async with asyncio.timeout(self._timeout), self._turns:
                return await self._scripts[script](keys=[PREFIX], args=[*self._bounds, *args])
        except (AuthenticationError, NoPermissionError) as error:
            raise ConfigurationError(f"Redis refuses us ({type(error).__name__}); look at MASKD_REDIS_URL") from error
        except (RedisError, OSError, TimeoutError) as error:
            raise UnavailableError(f"Redis does not answer ({type(error).__name__})") from error
