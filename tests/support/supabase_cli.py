"""The real Supabase command line, in a project folder of its own; skipped, with a reason, where it is not installed."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).resolve().parents[1] / "npm" / "node_modules" / ".bin" / "supabase"
SECONDS_MAX = 60


@dataclass(frozen=True, slots=True)
class Ran:
    """How a command ended, and what it said; `answer` is its JSON, empty where it failed before there was one."""

    code: int
    said: str
    answer: dict[str, Any]


class SupabaseProject:
    """A repository with `supabase/migrations`, whose commands go to one database."""

    def __init__(self, folder: Path, dsn: str) -> None:
        if not PROGRAM.exists():
            pytest.skip("the Supabase CLI is not installed (npm install --prefix tests/npm)")
        self.folder = folder
        self.migrations = folder / "supabase" / "migrations"
        self.migrations.mkdir(parents=True)
        self.dsn = dsn

    def add(self, name: str, sql: str) -> None:
        """A migration of the project's own."""
        (self.migrations / name).write_text(sql)

    def push(self, *more: str) -> Ran:
        return self._run("db", "push", *more)

    def pushed(self) -> list[str]:
        """Push, which must succeed; the names of the files that ran."""
        ran = self.push()
        assert ran.code == 0, ran.said
        return [Path(name).name for name in ran.answer["migrations"]]

    def both_sides(self) -> list[tuple[str, str]]:
        """What `migration list` shows: versions here and in the database, side by side."""
        ran = self._run("migration", "list")
        assert ran.code == 0, ran.said
        return [(line["local"], line["remote"]) for line in ran.answer["migrations"]]

    def fetch(self) -> None:
        """Write the database's history into the folder."""
        ran = self._run("migration", "fetch")
        assert ran.code == 0, ran.said

    def mark_applied(self, versions: list[str]) -> None:
        ran = self._run("migration", "repair", "--status", "applied", *versions)
        assert ran.code == 0, ran.said

    def advisors(self) -> Ran:
        """Supabase's own linter of schemas; ends with 1 when it has a warning or an error."""
        return self._run("db", "advisors", "--level", "warn", "--fail-on", "warn")

    def _run(self, *words: str) -> Ran:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SUPABASE_", "PG"))}
        done = subprocess.run(
            [str(PROGRAM), *words, f"--remote={self.dsn}?sslmode=disable", "--yes", "--output-format", "json"],
            cwd=self.folder,
            env={**kept, "HOME": str(self.folder), "SUPABASE_TELEMETRY_DISABLED": "1", "DO_NOT_TRACK": "1"},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=SECONDS_MAX,
            check=False,
        )
        answer = json.loads(done.stdout) if done.stdout.startswith("{") else {}
        return Ran(done.returncode, done.stderr + done.stdout, answer)
