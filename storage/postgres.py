"""TaskStore on asyncpg: each method calls one function of `migrations/`.

Enters: a DSN. Leaves: values of `storage.base`. Never holds a transaction open across an await of something else.
"""

from __future__ import annotations

import asyncio
import json
import re
import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any

import asyncpg

from storage.base import (
    Beat,
    Claimed,
    ConfigurationError,
    Outcome,
    RefusedError,
    SchemaError,
    Task,
    Tended,
    Tombstone,
    UnavailableError,
    Verdict,
)
from storage.schema import migration_files
from storage.way import BY_DSN, LISTEN_HINT, Way, connect

IDLE_SECONDS_MAX = 60.0
REFUSED_CREDENTIALS = ("28", "3D", "42501", "42883", "3F")  # authorization, no such database, grant, function, schema
NO_SESSION = ("26000", "42P05")  # a prepared statement that another server connection has, or has not
UNKNOWN_PARAMETER = "unsupported startup parameter"  # a pooler's answer to what DATABASE_URL carries
NO_TLS = "rejected SSL upgrade"

CLAIM = "select * from maskd.claim($1, $2, $3, $4)"
CLAIM_SUSPECTS = "select * from maskd.claim_suspects($1, $2, $3, $4)"
SETTLE = "select id, token, verdict from maskd.settle($1)"
HOT = (CLAIM, SETTLE)  # each keeps a connection of its own
TEND = "select maskd.tend($1, $2, $3, $4, $5)"
BEAT = "select id, token from maskd.beat($1, $2, $3, $4, $5, $6, $7, $8)"
OWNER = "select user_id::text from public.projects where id = $1::text::uuid"
TEMPLATES = "select value from maskd.settings where key = 'key_templates'"


def translate(error: BaseException) -> Exception:
    """What a failed database call means to the rest of maskd. Messages carry no DSN."""
    if isinstance(error, asyncpg.PostgresError):
        state = error.sqlstate or ""
        sentence = f"the database answered {state}: {error.args[0] if error.args else type(error).__name__}"
        if state in NO_SESSION:
            return ConfigurationError(f"{sentence}; a pooler in transaction mode is in between: {LISTEN_HINT}")
        if state.startswith(REFUSED_CREDENTIALS) or UNKNOWN_PARAMETER in sentence:
            return ConfigurationError(sentence)
        if state.startswith(("08", "25", "40", "53", "55", "57", "58", "XX")):  # 25: read-only, as after a failover; XX: poolers
            return UnavailableError(sentence)
        return RefusedError(sentence)
    if isinstance(error, asyncpg.ClientConfigurationError):
        reason = re.sub(r",? got .*|: '.*", "", str(error.args[0]), flags=re.DOTALL)  # it quotes what it did not understand
        return ConfigurationError(f"DATABASE_URL is not understood: {reason}")
    if isinstance(error, ssl.SSLCertVerificationError):
        return ConfigurationError(
            f"the database's certificate is not accepted ({error.verify_message}); MASKD_DB_CA must be the"
            " authority that signed it, and DATABASE_URL must name the host as the certificate does"
        )
    if isinstance(error, ConnectionError) and NO_TLS in str(error):
        return ConfigurationError("the database speaks no TLS, which MASKD_DB_CA or the sslmode of DATABASE_URL asks for")
    if isinstance(error, socket.gaierror):
        return UnavailableError("the database does not answer: the host name of DATABASE_URL is not known here")
    if isinstance(error, (OSError, TimeoutError, asyncpg.InterfaceError, asyncpg.InternalClientError, EOFError)):
        return UnavailableError(f"the database does not answer ({type(error).__name__})")
    raise error


class Lines:
    """A few connections, made when needed. asyncpg's own pool takes a task and several turns of the loop to give one back, and
    waits for the server's consent to drop one; here one whose call was cut off is simply thrown away: calls may be replayed.
    """

    def __init__(self, dsn: str, most: int, timeout_seconds: float, way: Way) -> None:
        self._dsn = dsn
        self._way = way
        self._timeout = timeout_seconds
        self._turns = asyncio.Semaphore(most)
        self._idle: list[tuple[float, str, asyncpg.Connection]] = []

    async def fetch(self, query: str, args: Sequence[Any]) -> list[asyncpg.Record]:
        """One call on a free connection; TimeoutError past the time-out, waiting for a connection included."""
        async with asyncio.timeout(self._timeout), self._turns:
            connection = self._warm(query) or await self._connect()
            try:
                rows: list[asyncpg.Record] = await connection.fetch(query, *args)
            except asyncpg.PostgresError:
                self._keep(connection, query)
                raise
            except BaseException:
                connection.terminate()
                raise
            self._keep(connection, query)
            return rows

    def close(self) -> None:
        """Drop what is idle; what is in use is dropped by whoever is cut off."""
        while self._idle:
            self._idle.pop()[2].terminate()

    def _warm(self, query: str) -> asyncpg.Connection | None:
        """An idle connection, best one that made this call before: on another the server would plan it anew. None that has ended
        or has been idle for so long that a router may have forgotten it."""
        young = time.monotonic() - IDLE_SECONDS_MAX
        for _, _, connection in [line for line in self._idle if line[2].is_closed() or line[0] < young]:
            connection.terminate()
        self._idle = [line for line in self._idle if not line[2].is_closed()]
        fit = [line for line in self._idle if line[1] == query] or [line for line in self._idle if line[1] not in HOT]
        if not fit:
            return None
        self._idle.remove(fit[-1])
        return fit[-1][2]

    def _keep(self, connection: asyncpg.Connection, query: str) -> None:
        if not connection.is_closed():
            self._idle.append((time.monotonic(), query, connection))

    async def _connect(self) -> asyncpg.Connection:
        return await connect(self._dsn, self._way, "maskd", self._timeout, prepares=True)


class PostgresStore:
    """TaskStore over a small pool of connections; a lost connection is replaced by the next call."""

    def __init__(self, dsn: str, *, connections_max: int = 6, timeout_seconds: float = 10.0, way: Way = BY_DSN) -> None:
        self._lines = Lines(dsn, connections_max, timeout_seconds, way)

    async def open(self) -> None:
        try:
            await self._check_version()
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        self._lines.close()

    async def claim(self, worker: str, token: str, kinds: Sequence[str], most: int) -> Claimed:
        return self._claimed(token, await self._fetch(CLAIM, worker, token, kinds, most))

    async def claim_suspects(self, worker: str, token: str, kinds: Sequence[str], most: int) -> Claimed:
        return self._claimed(token, await self._fetch(CLAIM_SUSPECTS, worker, token, kinds, most))

    async def settle(self, outcomes: Sequence[Outcome]) -> dict[tuple[str, str], Verdict]:
        rows = await self._fetch(SETTLE, "[" + ",".join(map(_outcome_json, outcomes)) + "]")
        return {(row[0], row[1]): Verdict(row[2]) for row in rows}

    async def beat(self, beat: Beat) -> list[tuple[str, str]]:
        ids = [task_id for task_id, _ in beat.held]
        tokens = [token for _, token in beat.held]
        rows = await self._fetch(
            BEAT,
            beat.worker,
            beat.lease_seconds,
            json.dumps(beat.info),
            list(beat.kinds),
            ids,
            tokens,
            list(beat.begun_ids),
            list(beat.open_tokens),
        )
        return [(row[0], row[1]) for row in rows]

    async def tend(
        self, worker: str, lease_seconds: float, unserved_seconds: float, most: int, ahead_seconds: float
    ) -> Tended | None:
        found = await self._value(TEND, worker, lease_seconds, unserved_seconds, most, ahead_seconds)
        if found is None:
            return None
        said = json.loads(found)
        stones = tuple(Tombstone(row["id"], row["prefix"]) for row in said["tombstones"])
        return Tended(said["rescued"], stones, said["work"], said["silent_seconds"])

    async def rescue(self, worker: str, unserved_seconds: float) -> int:
        return int(await self._value("select maskd.rescue($1, $2)", worker, unserved_seconds))

    async def bury(self, worker: str, begun_ids: Sequence[str]) -> int:
        return int(await self._value("select maskd.bury($1, $2)", worker, list(begun_ids)))

    async def leave(self, worker: str) -> None:
        await self._fetch("select maskd.leave($1)", worker)

    async def tombstones(self, most: int) -> list[Tombstone]:
        rows = await self._fetch("select id, prefix from maskd.due_tombstones($1)", most)
        return [Tombstone(row[0], row[1]) for row in rows]

    async def bury_tombstones(self, ids: Sequence[int]) -> None:
        await self._fetch("select maskd.bury_tombstones($1)", list(ids))

    async def masks_of(self, task_id: str, project_id: str) -> str | None:
        address: str | None = await self._value("select maskd.masks_of($1, $2)", task_id, project_id)
        return address

    async def owner_of(self, project_id: str) -> str | None:
        rows = await self._fetch(OWNER, project_id)
        return str(rows[0][0]) if rows else None

    async def key_templates(self) -> list[str]:
        return [str(template) for template in json.loads(await self._value(TEMPLATES) or "[]")]

    async def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self._value("select maskd.status()"))
        return found

    async def checkup(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await self._value("select maskd.checkup()"))
        return found

    async def ask(self, function: str, **arguments: Any) -> Any:
        named = ", ".join(f"{name} => ${place}" for place, name in enumerate(arguments, 1))
        values = [json.dumps(value) if isinstance(value, dict) else value for value in arguments.values()]
        answer = await self._value(f"select public.maskd_{function}({named})", *values)
        return None if answer is None else json.loads(answer)

    async def probe(self) -> None:
        await self._value("select 1")

    async def _check_version(self) -> None:
        known = [file.name.partition("_")[0] for file in migration_files()]
        if await self._value("select to_regclass('maskd.migrations') is null"):
            raise SchemaError(
                "This database has no maskd schema; run: maskd migrate (on a plain Postgres: maskd migrate --plain)"
            )
        applied = {row[0] for row in await self._fetch("select version from maskd.migrations")}
        missing = [version for version in known if version not in applied]
        if missing:
            raise SchemaError(f"The database schema lacks {len(missing)} migration(s), first {missing[0]}; run: maskd migrate")

    @staticmethod
    def _claimed(token: str, rows: Sequence[asyncpg.Record]) -> Claimed:
        rows = sorted(rows, key=_turn)
        last = rows.pop() if rows and rows[-1][0] is None else None
        tasks = tuple(Task(row[0], token, *row[1:11]) for row in rows)
        return Claimed(tasks) if last is None else Claimed(tasks, last[13], bool(last[14]))

    async def _fetch(self, query: str, *args: Any) -> list[asyncpg.Record]:
        try:
            return await self._lines.fetch(query, args)
        except Exception as error:
            raise translate(error) from error

    async def _value(self, query: str, *args: Any) -> Any:
        return (await self._fetch(query, *args))[0][0]


def _outcome_json(outcome: Outcome) -> str:
    head = f'{{"id":"{outcome.id}","token":"{outcome.token}","fate":"{outcome.fate}"'
    if outcome.code is not None:
        head += f',"code":{json.dumps(outcome.code)},"message":{json.dumps(outcome.message)}'
    if outcome.delay_seconds:
        head += f',"delay":{outcome.delay_seconds}'
    if outcome.wrote:
        head += ',"wrote":true'
    return head + ("}" if outcome.values == "{}" else "," + outcome.values[1:])


def _turn(row: asyncpg.Record) -> tuple[bool, int, float]:
    """Claimed rows by priority and fair rank; the row without id, which tells what else there is, comes last."""
    return row[0] is None, -(row[11] or 0), row[12] or 0.0
