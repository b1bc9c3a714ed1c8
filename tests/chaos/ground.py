"""What a whole run stands on: a Postgres that may be restarted, an S3 server, a folder, and a connection past all faults."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from chaos.history import RECORD
from psycopg.rows import dict_row
from support.database import migrate, run
from support.s3 import S3Server, s3_server

from storage.embedded import EmbeddedPostgres


class Tables:
    """The tables past every proxy. Statements may be asked again: whatever they insert has an id that was chosen here."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: psycopg.Connection[dict[str, Any]] | None = None

    def ask(self, sql: str, *arguments: Any, user: str | None = None) -> list[dict[str, Any]]:
        """Rows of one statement, as superuser or as PostgREST would for that user; once more when the connection had broken."""
        try:
            return self._ask(sql, arguments, user)
        except psycopg.OperationalError:
            self.close()
            return self._ask(sql, arguments, user)

    def one(self, sql: str, *arguments: Any) -> Any:
        """The first column of the first row."""
        return next(iter(self.ask(sql, *arguments)[0].values()))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _ask(self, sql: str, arguments: Sequence[Any], user: str | None) -> list[dict[str, Any]]:
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, autocommit=True, row_factory=dict_row, connect_timeout=10)
        with self._connection.transaction():
            if user is not None:
                claims = json.dumps({"sub": user, "role": "authenticated"})
                self._connection.execute("select set_config('request.jwt.claims', %s, true)", [claims])
                self._connection.execute("set local role authenticated")
            cursor = self._connection.execute(sql, arguments or None, prepare=False)  # type: ignore[call-overload]
            return cursor.fetchall() if cursor.description else []


@dataclass(frozen=True, slots=True)
class Ground:
    """One run: episodes follow each other on it, each with rows, blobs and daemons of its own."""

    folder: Path
    postgres: EmbeddedPostgres
    tables: Tables
    s3: S3Server


@contextmanager
def ground(folder: Path) -> Iterator[Ground]:
    """Everything started, and ended at the end."""
    with EmbeddedPostgres.start() as postgres, s3_server() as s3:
        run(migrate(postgres.dsn))
        tables = Tables(postgres.dsn)
        tables.ask(RECORD)
        tables.ask("update maskd.settings set value = '100000' where key = 'active_rows_max'")
        try:
            yield Ground(folder, postgres, tables, s3)
        finally:
            tables.close()
