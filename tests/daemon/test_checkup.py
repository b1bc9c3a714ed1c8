"""The check-up: a healthy set-up is all ok, and whatever is broken is told by its own line, with what to do."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest
from support.database import Database, migrate, run
from support.pgbouncer import pgbouncer
from support.postgrest import SERVICE_KEY
from support.proxy import tcp_proxy
from support.realtime_server import supabase
from support.redis_server import redis_server
from support.s3 import s3_server
from support.stores import new_id

from daemon import checkup, checkup_database
from daemon.checkup import Check, Line, State
from daemon.checkup_database import NAMES, clock_line, kinds_line, transactions_line, vacuum_line, wake_line
from daemon.commands.doctor import examine
from daemon.config import Config, load
from handlers.registry import discover
from storage.base import Beat
from storage.postgres import PostgresStore
from storage.schema import TABLES, declared, migration_files, plain_file

pytestmark = pytest.mark.anyio

NOWHERE = Path("/nonexistent/.env")
OF_THIS_HOST = {"host clock", "torch", "torchvision", "disk"}
"""Lines that depend on the machine on which the tests run."""


def configured(dsn: str, folder: Path, **settings: str) -> Config:
    values = {"DATABASE_URL": dsn, "MASKD_STATE_DIR": str(folder / "state"), "MASKD_WEIGHTS_DIR": str(folder / "weights")}
    if "R2_ENDPOINT" not in settings:
        values["MASKD_BLOB_DIR"] = str(folder / "blobs")
    return load({**values, "MASKD_KINDS": "segment_visual,segment_everything,convert_image", **settings}, NOWHERE)


def by_check(lines: list[Line]) -> dict[str, Line]:
    found = {line.check: line for line in lines}
    assert len(found) == len(lines), "each check has one line"
    return found


async def a_worker_lives(dsn: str) -> None:
    """One that serves every kind."""
    store = PostgresStore(dsn)
    await store.open()
    await store.beat(Beat(new_id(), 60, {"host": "here"}, tuple(discover())))
    await store.close()


async def test_a_healthy_set_up_on_postgres_and_s3_is_all_ok(database: Database, tmp_path: Path) -> None:
    await a_worker_lives(database.dsn)
    with s3_server() as s3, redis_server(tmp_path) as redis:
        bucket = s3.make_bucket()
        r2 = {"R2_ENDPOINT": s3.endpoint, "R2_ACCESS_KEY_ID": "test-key-id", "R2_SECRET_ACCESS_KEY": "test-secret-key"}
        config = configured(database.dsn, tmp_path, MASKD_REDIS_URL=redis, R2_BUCKET=bucket, **r2)
        lines = by_check(await examine(config))
        assert s3.client.list_objects_v2(Bucket=bucket).get("Contents", []) == [], "nothing is left behind"
    order = [*NAMES, "wake", "blobs", "sessions", "weights", "torch", "torchvision", "packages", "disk", "host clock"]
    assert list(lines) == order
    assert {name: line for name, line in lines.items() if line.state is not State.OK and name not in OF_THIS_HOST} == {}
    assert all(not line.advice for line in lines.values() if line.state is State.OK)
    assert "checksums when_required" in lines["blobs"].fact
    assert lines["connection"].fact.startswith("direct to 127.0.0.1")
    assert lines["weights"].fact == "classical for visual, everything"


async def test_a_healthy_set_up_by_rpc_and_realtime_is_all_ok(database: Database, tmp_path: Path) -> None:
    await a_worker_lives(database.dsn)
    with supabase(database.dsn) as (server, _realtime):
        config = configured("", tmp_path, SUPABASE_URL=server.url, SUPABASE_SERVICE_KEY=SERVICE_KEY)
        lines = by_check([*await checkup.run(checkup_database.checks(config))])
    assert {name: line for name, line in lines.items() if line.state is not State.OK} == {}
    assert lines["connection"].fact.startswith("RPC over 127.0.0.1")
    assert lines["wake"].fact.startswith("push by realtime: Realtime listens to the table")


BROKEN = {
    "a dropped index": (
        "drop index public.segmentation_results_claim",
        "indexes",
        "missing: segmentation_results_claim",
        "create index",
    ),
    "an invalid index": (
        "update pg_index set indisvalid = false where indexrelid = 'public.segmentation_results_rank'::regclass",
        "indexes",
        "invalid: segmentation_results_rank",
        "reindex index concurrently public.segmentation_results_rank",
    ),
    "a disabled trigger": (
        "alter table public.projects disable trigger maskd_keep_owner",
        "triggers",
        "disabled: maskd_keep_owner",
        "alter table public.projects enable trigger maskd_keep_owner",
    ),
    "a dropped trigger": (
        "drop trigger maskd_before_insert on public.segmentation_results",
        "triggers",
        "missing: maskd_before_insert",
        "create trigger maskd_before_insert before insert",
    ),
    "a revoked grant": (
        "revoke update on public.segmentation_results from service_role",
        "grants",
        "service_role may not UPDATE public.segmentation_results",
        "Grant it again",
    ),
    "a revoked function": (
        "revoke execute on function maskd.leave(uuid) from service_role",
        "grants",
        "service_role may not EXECUTE maskd.leave",
        "Grant it again",
    ),
    "a user's insert revoked": (
        "revoke insert (params) on public.segmentation_results from authenticated",
        "grants",
        "authenticated may not INSERT params of public.segmentation_results",
        "Grant it again",
    ),
    "a table for anon": (
        "grant select on public.segmentation_results to anon",
        "grants",
        "anon may SELECT public.segmentation_results",
        "Revoke it by name",
    ),
    "a table for everybody": ("grant select on maskd.workers to public", "grants", "anon may SELECT maskd.workers", "Revoke it"),
    "a claim's token for users": (
        "grant select (claim_token, id) on public.segmentation_results to authenticated",
        "grants",
        "authenticated may SELECT claim_token of public.segmentation_results",
        "Revoke it by name",
    ),
    "credits for users": (
        "grant update on public.users_profile to authenticated",
        "grants",
        "authenticated may UPDATE public.users_profile",
        "Revoke it by name",
    ),
    "the protocol for users": (
        "grant execute on function public.maskd_settle(jsonb) to authenticated",
        "grants",
        "authenticated may EXECUTE public.maskd_settle",
        "Revoke it by name",
    ),
    "no publication": (
        "alter publication supabase_realtime drop table public.segmentation_results",
        "publication",
        "browsers hear of no change",
        "alter publication supabase_realtime add table",
    ),
    "no primary key": (
        "alter table public.segmentation_results drop constraint segmentation_results_pkey cascade",
        "primary key",
        "none on id",
        "add primary key (id)",
    ),
    "row security off": (
        "alter table public.projects disable row level security",
        "row security",
        "off on projects",
        "alter table public.projects enable row level security",
    ),
    "a dropped policy": (
        "drop policy maskd_only_own on public.usage_logs",
        "row security",
        "missing: usage_logs.maskd_only_own",
        "migrations/",
    ),
    "no vacuum": (
        "alter table public.segmentation_results set (autovacuum_enabled = false)",
        "vacuum",
        "autovacuum is off",
        "Set autovacuum on",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_what_is_broken_in_the_database_is_told_by_its_line_alone(database: Database, tmp_path: Path, case: str) -> None:
    sql, check, fact, advice = BROKEN[case]
    await a_worker_lives(database.dsn)
    database.execute(sql)
    lines = by_check(await checkup_database.look(configured(database.dsn, tmp_path)))
    told = {name: line for name, line in lines.items() if line.state is not State.OK}
    assert list(told) == [check]
    assert fact in told[check].fact
    assert advice in told[check].advice
    assert told[check].state is (State.WARN if check == "publication" else State.BAD)


async def test_columns_that_an_adopted_table_has_of_its_own_are_its_owners_to_grant(database: Database, tmp_path: Path) -> None:
    for table in TABLES:
        database.execute(
            f"alter table public.{table} add column note text; grant select (note), insert (note), update (note)"
            f" on public.{table} to authenticated"
        )
    lines = by_check(await checkup_database.look(configured(database.dsn, tmp_path)))
    assert lines["grants"].state is State.OK


async def test_workers_by_realtime_hear_nothing_without_the_publication(database: Database, tmp_path: Path) -> None:
    database.execute("alter publication supabase_realtime drop table public.segmentation_results")
    with supabase(database.dsn) as (server, _realtime):
        config = configured("", tmp_path, SUPABASE_URL=server.url, SUPABASE_SERVICE_KEY=SERVICE_KEY)
        assert by_check(await checkup_database.look(config))["publication"].state is State.BAD


async def test_where_everybody_was_granted_everything_nothing_is_left_of_it(empty_database: Database, tmp_path: Path) -> None:
    empty_database.execute(plain_file().read_text())
    empty_database.execute(
        "alter default privileges grant execute on functions to anon, authenticated;"
        "alter default privileges grant all on tables to anon, authenticated"
    )
    for file in migration_files():
        empty_database.execute(file.read_text())
    assert by_check(await checkup_database.look(configured(empty_database.dsn, tmp_path)))["grants"].state is State.OK


async def test_what_the_migrations_declare_is_what_a_fresh_database_has(database: Database) -> None:
    store = PostgresStore(database.dsn)
    facts = await store.checkup()
    await store.close()
    should = declared()
    assert set(should["trigger"]) == set(facts["triggers"])
    assert set(should["policy"]) == set(facts["policies"])
    assert set(should["index"]) == {name for name in facts["indexes"] if not name.endswith("_pkey")}


async def test_a_transaction_that_is_open_for_long_is_told_of(database: Database, tmp_path: Path) -> None:
    holder = await asyncpg.connect(database.dsn, server_settings={"application_name": "somebody"})
    await holder.execute("begin; select txid_current()")
    store = PostgresStore(database.dsn)
    facts = (await store.checkup())["oldest_transaction"]
    await store.close()
    await holder.close()
    assert (facts["application"], facts["state"]) == ("somebody", "idle in transaction")
    line = transactions_line({**facts, "seconds": 1800})
    assert line.state is State.WARN
    assert line.fact.startswith("one is open for 30 minutes (idle in transaction somebody, process ")
    assert f"pg_terminate_backend({facts['name']})" in line.advice
    assert transactions_line(facts).state is State.OK
    assert transactions_line(None, sees=False).state is State.WARN


async def test_a_schema_that_is_missing_or_behind_is_told_and_nothing_else_is_guessed(
    empty_database: Database, tmp_path: Path
) -> None:
    config = configured(empty_database.dsn, tmp_path)
    lines = by_check(await checkup_database.look(config))
    assert list(lines) == list(NAMES)
    assert (lines["connection"].state, lines["schema"].state) == (State.OK, State.BAD)
    assert "maskd migrate --plain" in lines["schema"].advice
    assert {line.state for line in lines.values() if line.fact.startswith("not looked at")} == {State.WARN}
    run(migrate(empty_database.dsn))
    empty_database.execute("delete from maskd.migrations where name = 'lease'")
    line = by_check(await checkup_database.look(config))["schema"]
    assert (line.fact, line.advice) == ("The database schema lacks 1 migration(s), first 20261121000400", "Run: maskd migrate")


async def test_a_black_holed_database_is_told_within_its_time_out_and_the_others_go_on(
    database: Database, tmp_path: Path
) -> None:
    with tcp_proxy(database.host, database.port) as proxy:
        proxy.swallow()
        begun = time.monotonic()
        config = configured(database.through(proxy.port), tmp_path, MASKD_DATABASE_TIMEOUT_SECONDS="1")
        lines = by_check(await examine(config))
    assert time.monotonic() - begun < 60
    assert lines["connection"].fact == "the database does not answer (TimeoutError)"
    assert (lines["connection"].state, lines["wake"].state) == (State.BAD, State.BAD)
    assert lines["blobs"].state is State.OK


async def test_a_wrong_password_is_told_and_not_shown(database: Database, tmp_path: Path) -> None:
    dsn = f"postgresql://postgres:wrong-password-of-this-test@{database.host}:{database.port}/{database.name}"
    lines = await examine(configured(dsn, tmp_path))
    assert lines[0].fact.startswith("the database answered 28P01")
    assert not any("wrong-password" in line.fact + line.advice for line in lines)


async def test_a_role_that_may_do_nothing_is_told_so_and_not_to_look_at_the_firewall(database: Database, tmp_path: Path) -> None:
    role = f"maskd_nobody_{database.name[-8:]}"
    database.execute(f"create role {role} login password 'of-this-test'")
    try:
        dsn = f"postgresql://{role}:of-this-test@{database.host}:{database.port}/{database.name}"
        line, *rest = await examine(configured(dsn, tmp_path))
    finally:
        database.execute(f"drop role {role}")
    assert (line.state, "42501" in line.fact, "service_role" in line.advice) == (State.BAD, True, True)
    assert not any("of-this-test" in each.fact + each.advice for each in (line, *rest))


async def test_behind_a_pooler_the_way_is_named(database: Database, tmp_path: Path) -> None:
    with pgbouncer(database, "session") as dsn:
        assert by_check(await checkup_database.look(configured(dsn, tmp_path)))["connection"].fact.startswith("session pooler at")
    with pgbouncer(database, "transaction") as dsn:
        config = configured(dsn, tmp_path, MASKD_DB_POOLER="transaction")
        line = by_check(await checkup_database.look(config))["connection"]
        assert line.fact.startswith("transaction pooler at")
        wake = await wake_line(config)
        assert (wake.state, "by polling alone, every 1.5 s" in wake.fact) == (State.WARN, True)


@pytest.mark.parametrize("status", [403, 503])
async def test_a_realtime_that_refuses_is_told_without_the_key(database: Database, tmp_path: Path, status: int) -> None:
    with supabase(database.dsn) as (server, realtime):
        realtime.handshake_status = status
        line = await wake_line(configured("", tmp_path, SUPABASE_URL=server.url, SUPABASE_SERVICE_KEY=SERVICE_KEY))
    assert line.state is State.BAD
    assert line.fact.startswith("Realtime does not tell: ")
    assert SERVICE_KEY not in line.fact


@pytest.mark.parametrize(
    ("skew", "state", "told"),
    [
        (0.5, State.OK, "within"),
        (7.0, State.WARN, "7 s ahead of"),
        (-7.0, State.WARN, "7 s behind"),
        (900.0, State.BAD, "900 s ahead"),
    ],
)
def test_a_clock_that_is_off_is_told(skew: float, state: State, told: str) -> None:
    line = clock_line(1000.0, 999.9 + skew, 1000.1 + skew)
    assert (line.state, told in line.fact) == (state, True), line


def test_a_slow_answer_is_no_skew() -> None:
    assert clock_line(1000.0, 1000.0, 1009.0).state is State.OK


def test_dead_rows_that_pile_up_are_told() -> None:
    assert vacuum_line({"on": True, "dead": 300_000, "live": 10}).state is State.WARN
    assert vacuum_line({"on": True, "dead": 300_000, "live": 10_000_000}).state is State.OK


@pytest.mark.parametrize(
    ("status", "state", "told"),
    [
        ({"kinds": [("a", True)], "tasks": [], "workers": [True]}, State.OK, "all 1 are served"),
        ({"kinds": [("a", True), ("b", False)], "tasks": [("a", "pending")], "workers": [True]}, State.WARN, "nobody serves b"),
        ({"kinds": [("a", True), ("b", False)], "tasks": [("b", "pending")], "workers": [True]}, State.BAD, "rows wait for b"),
        ({"kinds": [("a", False)], "tasks": [("a", "delayed")], "workers": [False]}, State.WARN, "no worker is alive"),
        ({"kinds": [("P", False)], "tasks": [("P", "pending")], "workers": [True]}, State.WARN, "paused: P"),
        ({"kinds": [("P", True)], "tasks": [], "workers": [False]}, State.WARN, "no worker is alive; paused: P"),
        ({"kinds": [("P", True), ("b", False)], "tasks": [("b", "pending")], "workers": [True]}, State.BAD, "serves; paused: P"),
    ],
)
def test_kinds_that_nobody_serves_are_told_most_of_all_when_rows_wait(status: Mapping[str, Any], state: State, told: str) -> None:
    found = {
        "kinds": [{"kind": kind, "served": served, "paused": kind == "P"} for kind, served in status["kinds"]],
        "tasks": [{"kind": kind, "status": word} for kind, word in status["tasks"]],
        "workers": [{"alive": alive} for alive in status["workers"]],
    }
    line = kinds_line(found)
    assert (line.state, told in line.fact) == (state, True), line
    assert ("maskd resume" in line.advice) == ("P" in line.fact)


async def test_a_check_that_fails_or_hangs_stops_no_other_and_its_lines_are_all_there() -> None:
    async def fails() -> list[Line]:
        raise RuntimeError("something odd")

    async def hangs() -> list[Line]:
        await anyio.Event().wait()
        return []

    async def goes() -> list[Line]:
        return [Line("c", State.OK, "fine")]

    lines = await checkup.run([Check(("a", "a2"), 5, fails), Check(("b",), 0.05, hangs), Check(("c",), 5, goes)])
    assert [(line.check, line.state) for line in lines] == [
        ("a", State.BAD),
        ("a2", State.WARN),
        ("b", State.BAD),
        ("c", State.OK),
    ]
    assert (lines[0].fact, lines[2].fact) == ("RuntimeError: something odd", "no answer within 0.05 s")
