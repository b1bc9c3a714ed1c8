"""All that a test of the whole needs: a queue to fill and look at, a folder of blobs, daemons to start beside them.

Everything here blocks; the queue is looked at past any proxy, on a connection that is made anew when it breaks.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from psycopg.rows import dict_row
from support.daemons import DaemonProcess, environment, running, wait_until
from support.database import Database
from support.kinds_daemon import KINDS, KINDS_VARIABLE, PROGRAM

from storage.files import FileBlobs

PHOTO = Path(__file__).resolve().parents[2] / "daemon" / "photos" / "chelsea.jpg"
PHOTO_BOX = [60, 10, 380, 290]
FINAL = ("done", "error", "canceled")
URLS = ("mask_image_url", "masks_url", "result_image_url")
COLUMNS = """id::text, kind, status, attempts, deaths, error, labels, metadata, mask_image_url, masks_url, result_image_url,
  worker_id::text, claim_token::text, started_at, finished_at, updated_at"""

COUNT_ENDS = """
create table public.ends (task_id uuid not null, status text not null);
create function public.count_end() returns trigger language plpgsql security definer as
  $$ begin insert into public.ends values (new.id, new.status); return null; end $$;
create trigger count_end after update of status on public.segmentation_results for each row
  when (new.status in ('done', 'error')) execute function public.count_end();
"""


class Queue:
    """The tables as a test sees them. Every row that ends is counted by a trigger, so that twice would be seen."""

    def __init__(self, dsn: str) -> None:
        self._dsn = dsn
        self._connection: psycopg.Connection[dict[str, Any]] | None = None
        self.ask(COUNT_ENDS)
        self.user, self.project = self.owner()
        for kind in KINDS:
            self.ask("insert into maskd.kinds (kind) values (%s) on conflict do nothing", kind)

    def ask(self, sql: str, *arguments: Any) -> list[dict[str, Any]]:
        """Rows of one statement; once more on a new connection when the old one had broken."""
        try:
            return self._ask(sql, arguments)
        except psycopg.OperationalError:
            self.close()
            return self._ask(sql, arguments)

    def one(self, sql: str, *arguments: Any) -> Any:
        """The first column of the first row."""
        return next(iter(self.ask(sql, *arguments)[0].values()))

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def owner(self) -> tuple[str, str]:
        """A new user and a project of theirs."""
        user = self.one("insert into auth.users (email) values (gen_random_uuid() || '@localhost') returning id::text")
        return user, self.one("insert into public.projects (user_id, name) values (%s, 'test') returning id::text", user)

    def insert(self, kind: str, params: Any = None, key: str | None = None, count: int = 1) -> list[str]:
        """Rows alike, in one statement; their ids."""
        rows = self.ask(
            """insert into public.segmentation_results (project_id, kind, source_image_url, params)
               select %s, %s, %s, %s::jsonb from generate_series(1, %s) returning id::text""",
            self.project,
            kind,
            key,
            params if isinstance(params, str) else json.dumps(params or {}),
            count,
        )
        return [row["id"] for row in rows]

    def rows(self, ids: Sequence[str]) -> list[dict[str, Any]]:
        """These rows, without what was asked, in the order of `ids`; unique identifiers as text."""
        found = self.ask(f"select {COLUMNS} from public.segmentation_results where id = any (%s)", list(ids))
        by_id = {row["id"]: row for row in found}
        return [by_id[task_id] for task_id in ids]

    def row(self, task_id: str) -> dict[str, Any]:
        return self.rows([task_id])[0]

    def states(self, ids: Sequence[str]) -> Counter[str]:
        """How many of these rows are in each state."""
        return Counter(row["status"] for row in self.rows(ids))

    def finished(self, ids: Sequence[str], seconds: float = 45.0) -> list[dict[str, Any]]:
        """These rows once all have ended; AssertionError with the states when that takes too long."""
        try:
            wait_until("every row ends", lambda: all(row["status"] in FINAL for row in self.rows(ids)), seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}: {dict(self.states(ids))}") from None
        return self.rows(ids)

    def ends(self, ids: Sequence[str]) -> Counter[str]:
        """How many of these rows ended exactly once as `done` or `error`, and how many more often (`twice`)."""
        ends = self.ask(
            "select task_id, min(status) as status, count(*) as times from public.ends where task_id = any (%s) group by 1",
            list(ids),
        )
        return Counter("twice" if row["times"] > 1 else row["status"] for row in ends)

    def _ask(self, sql: str, arguments: Sequence[Any]) -> list[dict[str, Any]]:
        if self._connection is None:
            self._connection = psycopg.connect(self._dsn, autocommit=True, row_factory=dict_row, connect_timeout=10)
        cursor = self._connection.execute(sql, arguments or None, prepare=False)  # type: ignore[call-overload]
        return cursor.fetchall() if cursor.description else []


@dataclass(slots=True, eq=False)
class Site:
    """One database, one folder, any number of daemons."""

    database: Database
    queue: Queue
    folder: Path
    blobs: FileBlobs

    @property
    def photo(self) -> str:
        """The key of an uploaded photo."""
        return f"uploads/{self.queue.user}/cat.jpg"

    def settings(self, dsn: str | None = None, **settings: str) -> dict[str, str]:
        """The environment of a daemon on this database, by way of `dsn` when given."""
        return environment(dsn or self.database.dsn, self.folder, **settings)

    def daemon(self, *kinds: str, dsn: str | None = None, **settings: str) -> AbstractContextManager[DaemonProcess]:
        """A daemon that claims these kinds (all when none is named); killed at the end if it still runs."""
        return running(self.settings(dsn, **{KINDS_VARIABLE: " ".join(kinds)}, **settings), self.folder, PROGRAM)

    def hold(self, **more: Any) -> Mapping[str, Any]:
        """The params of a row that holds until `let_go`."""
        return {"folder": str(self.folder), **more}

    def begun(self, ids: Sequence[str]) -> set[str]:
        """Which of these holding rows have begun in a handler."""
        return {task_id for task_id in ids if (self.folder / f"begun-{task_id}").exists()}

    def let_go(self) -> None:
        (self.folder / "go").touch()

    def stored(self) -> set[str]:
        """Keys of all blobs that daemons wrote."""
        return set(self.blobs.list("masks/", 100_000))

    def published(self) -> set[str]:
        """Keys that rows in `done` name."""
        rows = self.queue.ask(f"select {', '.join(URLS)} from public.segmentation_results where status = 'done'")
        return {address for row in rows for address in row.values() if address}


@contextmanager
def site_on(database: Database, folder: Path) -> Iterator[Site]:
    """A site whose blobs are files, with one photo uploaded."""
    blobs = FileBlobs(folder / "blobs")
    site = Site(database, Queue(database.dsn), folder, blobs)
    blobs.put(site.photo, PHOTO.read_bytes(), "image/jpeg")
    try:
        yield site
    finally:
        site.queue.close()
