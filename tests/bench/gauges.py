"""What a Postgres server did between two readings, and what went over the wire to it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncpg
import psutil
from support.loops import Loop, loop_in_thread

CHUNK_BYTES = 1 << 16
WAL = "select pg_wal_lsn_diff(pg_current_wal_lsn(), '0/0')::float8"
FUNCTIONS = """select schemaname || '.' || funcname as name, calls::integer, self_time::float8 as self_ms
  from pg_stat_user_functions order by self_time desc"""
CONNECTIONS = "select application_name, count(*)::integer from pg_stat_activity where application_name like 'maskd%' group by 1"


@dataclass(frozen=True, slots=True)
class Reading:
    """Processor seconds of every process of the server, and bytes of write-ahead log, since its start."""

    cpu_seconds: dict[int, float]
    wal_bytes: float

    def cpu_since(self, before: Reading) -> float:
        """Processor seconds between two readings. Of a process that ended in between its last moments are missing."""
        return sum(seconds - before.cpu_seconds.get(pid, 0.0) for pid, seconds in self.cpu_seconds.items())


class Gauge:
    """Readings of one server, through a connection to one of its databases."""

    def __init__(self, connection: asyncpg.Connection[Any], pid: int) -> None:
        self._connection = connection
        self._postmaster = psutil.Process(pid)

    async def read(self) -> Reading:
        wal = float(await self._connection.fetchval(WAL))
        processes = [self._postmaster, *self._postmaster.children(recursive=True)]
        return Reading({process.pid: ran_seconds(process.pid) for process in processes}, wal)

    async def functions(self) -> list[asyncpg.Record]:
        """Calls and milliseconds of every function so far, of sessions that have ended or been idle for ten seconds."""
        return list(await self._connection.fetch(FUNCTIONS))

    async def connections(self) -> int:
        """How many connections daemons hold."""
        return sum(row[1] for row in await self._connection.fetch(CONNECTIONS))


def ran_seconds(pid: int) -> float:
    """How long a process of one thread has been on a processor, exactly where the kernel tells; 0 when it has gone."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
    except ProcessLookupError:
        return 0.0
    except FileNotFoundError:
        try:
            times = psutil.Process(pid).cpu_times()
        except psutil.NoSuchProcess:
            return 0.0
        return times.user + times.system


class Wire:
    """Forwards connections and counts their bytes, both ways."""

    def __init__(self, host: str, port: int) -> None:
        self._upstream = (host, port)
        self.bytes = 0

    async def serve(self) -> int:
        """Listen; the port."""
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(server.sockets[0].getsockname()[1])

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        other_reader, other_writer = await asyncio.open_connection(*self._upstream)
        await asyncio.gather(self._pump(reader, other_writer), self._pump(other_reader, writer), return_exceptions=True)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(CHUNK_BYTES):
                self.bytes += len(data)
                writer.write(data)
                await writer.drain()
        finally:
            writer.close()


@contextmanager
def wire(host: str, port: int) -> Iterator[tuple[Wire, int]]:
    """A counted way to a server, and its port."""
    loop: Loop
    with loop_in_thread() as loop:
        made = Wire(host, port)
        yield made, loop.run(made.serve())
