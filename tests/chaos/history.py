"""What happened to every row, written by a trigger in the very transaction, and what can be read from it. Reading is pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

FINAL = frozenset({"done", "error", "canceled"})

RECORD = """
create table if not exists public.history (n bigserial, task uuid not null, at timestamptz not null, status text not null,
  attempts int, deaths int, token uuid, worker uuid);
create index if not exists history_task on public.history (task);
create or replace function public.record() returns trigger language plpgsql security definer as $$ begin
  insert into public.history (task, at, status, attempts, deaths, token, worker)
    values (new.id, clock_timestamp(), new.status, new.attempts, new.deaths, new.claim_token, new.worker_id);
  return null; end $$;
create or replace trigger record_inserts after insert on public.segmentation_results
  for each row execute function public.record();
create or replace trigger record_updates after update on public.segmentation_results for each row
  when (old.status is distinct from new.status or old.claim_token is distinct from new.claim_token
    or old.finished_at is distinct from new.finished_at)
  execute function public.record();
"""
READ = """select task::text, extract(epoch from at)::float8 as at, status, attempts, deaths, token::text, worker::text
  from public.history where task = any (%s) order by n"""


@dataclass(frozen=True, slots=True)
class Entry:
    """A row as it was from `at` on, in seconds since 1970 by the database's clock."""

    at: float
    status: str
    attempts: int
    deaths: int
    token: str | None
    worker: str | None


History = Mapping[str, Sequence[Entry]]


def by_task(rows: Iterable[Mapping[str, Any]]) -> History:
    """The entries of each task, in order."""
    found: dict[str, list[Entry]] = {}
    for row in rows:
        values = (row[name] for name in ("at", "status", "attempts", "deaths", "token", "worker"))
        found.setdefault(row["task"], []).append(Entry(*values))
    return found


def ends(entries: Sequence[Entry]) -> list[Entry]:
    """The entries by which a row ended, or was changed after it had: more than one is one too many."""
    ended = next((number for number, entry in enumerate(entries) if entry.status in FINAL), len(entries))
    return list(entries[ended:])


def processing_at(history: History, at: float) -> list[str]:
    """The tasks that a worker held at that time."""
    return [task for task, entries in history.items() if (entry := _entry_at(entries, at)) and entry.status == "processing"]


def recovered(history: History, at: float) -> tuple[float, str] | None:
    """After how many seconds the last of the rows that workers held at that time had ended, and which that was; None when they
    held none, or one never ended."""
    held = processing_at(history, at)
    times = [(ends(history[task])[0].at - at, task) for task in held if ends(history[task])]
    return max(times) if times and len(times) == len(held) else None


def told(entries: Sequence[Entry]) -> str:
    """The story of one row, a line per change."""
    began = entries[0].at if entries else 0.0
    return "\n".join(
        f"    +{entry.at - began:8.3f} s  {entry.status:<10} attempts {entry.attempts}  deaths {entry.deaths}"
        f"  token {entry.token or '-':<36}  worker {entry.worker or '-'}"
        for entry in entries
    )


def _entry_at(entries: Sequence[Entry], at: float) -> Entry | None:
    return next((entry for entry in reversed(entries) if entry.at <= at), None)
