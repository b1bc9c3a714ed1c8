"""The database's part of a check-up: the way there, the schema, who may do what, what slows claims, and how work is told of.

Enters: Config. Leaves: lines. The database tells facts (`maskd.checkup()`); what they mean is decided here, without I/O.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from daemon.checkup import Check, Line, State, by_name, not_looked_at
from daemon.config import Config
from daemon.stores import build_sources, build_store, look_at_way, place_of, way_of
from storage.base import ConfigurationError, SchemaError, TaskStore, UnavailableError
from storage.schema import declared, migration_files
from storage.way import LISTEN_HINT, Seen, is_transaction_pooler

NAMES = (
    "connection",
    "tls",
    "schema",
    "grants",
    "publication",
    "primary key",
    "triggers",
    "indexes",
    "row security",
    "transactions",
    "vacuum",
    "clock",
    "kinds",
)
ROUND_SECONDS_MAX = 15.0
WAKE_SECONDS_MAX = 25.0
OLD_TRANSACTION_SECONDS = 300.0
DEAD_ROWS_MAX = 100_000
SKEW_SECONDS_MAX = 2.0
SKEW_SECONDS_BAD = 300.0
NAMED_MAX = 4
RUN_MIGRATE = "Run: maskd migrate"
BY_HAND = "Look up its statement in migrations/ and run it in SQL."


def checks(config: Config) -> list[Check]:
    """The database, and beside it how a worker would hear of work."""

    async def database() -> list[Line]:
        return await look(config)

    async def wake() -> list[Line]:
        return [await wake_line(config)]

    seconds = 3 * config.database_timeout_seconds + ROUND_SECONDS_MAX
    return [Check(NAMES, seconds, database), Check(("wake",), WAKE_SECONDS_MAX + config.database_timeout_seconds, wake)]


async def look(config: Config) -> list[Line]:
    """Every line about the database."""
    store = build_store(config)
    try:
        begun = time.monotonic()
        seen = await look_at_way(config)
        lacking = await _open(store)
        found = {
            "connection": connection_line(config, seen, time.monotonic() - begun),
            "tls": tls_line(config, seen),
        }
        if lacking is not None:
            found["schema"] = Line("schema", State.BAD, *_fact_and_advice(lacking))
            return [*found.values(), *not_looked_at(NAMES[3:], "the schema is not there, or not all of it")]
        begun = time.time()
        facts = await store.checkup()
        clock = clock_line(float(facts["now"]), begun, time.time())
        status = await store.status()
    except (UnavailableError, ConfigurationError) as error:
        return [
            Line("connection", State.BAD, str(error), _how_to_connect(config, str(error))),
            *not_looked_at(NAMES[1:], "no connection"),
        ]
    finally:
        await store.close()
    found |= {line.check: line for line in (*judged(facts, realtime=config.database_url is None), clock, kinds_line(status))}
    return by_name(NAMES, found)


def judged(facts: Mapping[str, Any], *, realtime: bool) -> list[Line]:
    """What the database tells of itself, weighed. `realtime` says that workers hear of rows by the publication."""
    should = declared()
    return [
        schema_line(facts["versions"], str(facts["server"])),
        grants_line(facts["grants_too_many"], facts["grants_lacking"]),
        publication_line(bool(facts["publication"]), realtime),
        primary_key_line(bool(facts["primary_key"])),
        triggers_line(should["trigger"], facts["triggers"]),
        indexes_line(should["index"], facts["indexes"]),
        row_security_line(set(should["policy"]), facts["row_security"], facts["policies"]),
        transactions_line(facts["oldest_transaction"], sees=bool(facts["sees_transactions"])),
        vacuum_line(facts["vacuum"]),
    ]


def connection_line(config: Config, seen: Seen, seconds: float) -> Line:
    """Which way the database is reached."""
    if config.database_url is None:
        return Line("connection", State.OK, f"RPC over {urlsplit(config.supabase_url or '').netloc}, {seconds * 1000:.0f} ms")
    dsn = config.database_dsn()
    trip = f"{place_of(dsn)}, {seen.round_trip_seconds * 1000:.1f} ms a round trip"
    if is_transaction_pooler(dsn, way_of(config)):
        what = "transaction pooler at" if seen.pooled else "taken for a transaction pooler (no pooler is seen):"
        return Line("connection", State.OK, f"{what} {trip}")
    return Line("connection", State.OK, f"{'session pooler at' if seen.pooled else 'direct to'} {trip}")


def tls_line(config: Config, seen: Seen) -> Line:
    """Whether the server is who it says, and nobody reads along."""
    if seen.verified:
        return Line("tls", State.OK, f"{seen.tls}, the server is verified")
    if seen.local:
        return Line("tls", State.OK, f"{seen.tls or 'none'}, nothing leaves this host")
    if config.database_url is None:
        return Line("tls", State.BAD, "none: the service key is sent in clear", "Begin SUPABASE_URL with https://.")
    ca = "Set MASKD_DB_CA to the file of the server's authority (Supabase: Database settings, SSL certificate)."
    if seen.tls is not None:
        return Line("tls", State.WARN, f"{seen.tls}, but the server is not verified", ca)
    return Line("tls", State.WARN, "none: everything is sent in clear", f"Switch TLS on at the server. {ca}")


def schema_line(versions: Sequence[str], server: str) -> Line:
    """Which migrations have run; those that this version needs have, or `open` would have told."""
    newer = len(set(versions) - {file.name.partition("_")[0] for file in migration_files()})
    known = f"{len(versions)} migrations, PostgreSQL {server}"
    if newer:
        return Line("schema", State.OK, f"{known}; {newer} of them newer than this program")
    return Line("schema", State.OK, known)


def grants_line(too_many: Sequence[str], lacking: Sequence[str]) -> Line:
    """Who may do what they should not, and who may not do what they must."""
    if too_many:
        advice = "Revoke it by name (revoke … from anon, authenticated); users could read claims, forge results or credits."
        return Line("grants", State.BAD, _some(too_many), advice)
    if lacking:
        return Line("grants", State.BAD, _some(lacking), "Grant it again (grant … to that role), as migrations/ does.")
    return Line("grants", State.OK, "the service may do its work, users no more than they should")


def publication_line(published: bool, realtime: bool) -> Line:
    """Whether Realtime tells of changes."""
    if published:
        return Line("publication", State.OK, "supabase_realtime holds segmentation_results")
    advice = "Run in SQL: alter publication supabase_realtime add table public.segmentation_results"
    state = State.BAD if realtime else State.WARN
    who = "workers and browsers hear" if realtime else "browsers hear"
    return Line("publication", state, f"supabase_realtime lacks segmentation_results: {who} of no change", advice)


def primary_key_line(there: bool) -> Line:
    if there:
        return Line("primary key", State.OK, "segmentation_results (id)")
    advice = "Run in SQL: alter table public.segmentation_results add primary key (id)"
    return Line("primary key", State.BAD, "segmentation_results has none on id: Realtime and claims need it", advice)


def triggers_line(should: Mapping[str, str], there: Mapping[str, bool]) -> Line:
    """Whether every row is looked at when it comes in and goes."""
    if missing := sorted(set(should) - set(there)):
        return Line("triggers", State.BAD, f"missing: {_some(missing)}", f"Run in SQL: {should[missing[0]]}")
    if off := sorted(name for name in should if not there[name]):
        table = should[off[0]].partition(" on ")[2].split()[0]
        return Line("triggers", State.BAD, f"disabled: {_some(off)}", f"Run in SQL: alter table {table} enable trigger {off[0]}")
    return Line("triggers", State.OK, f"all {len(should)} in place")


def indexes_line(should: Mapping[str, str], there: Mapping[str, bool]) -> Line:
    """Whether claims find their rows by index."""
    if missing := sorted(set(should) - set(there)):
        return Line("indexes", State.BAD, f"missing: {_some(missing)}", f"Run in SQL: {should[missing[0]]}")
    if invalid := sorted(name for name in should if not there[name]):
        schema = "maskd" if " on maskd." in should[invalid[0]] else "public"
        advice = f"Run in SQL: reindex index concurrently {schema}.{invalid[0]}"
        return Line("indexes", State.BAD, f"invalid: {_some(invalid)}", advice)
    return Line("indexes", State.OK, f"all {len(should)} in place")


def row_security_line(policies: set[str], tables: Mapping[str, bool], there: Mapping[str, bool]) -> Line:
    """Whether rows are held apart, by policies of ours."""
    if off := sorted(table for table, on in tables.items() if not on):
        advice = f"Run in SQL: alter table public.{off[0]} enable row level security"
        return Line("row security", State.BAD, f"off on {_some(off)}: users may see the rows of others", advice)
    if missing := sorted(policies - set(there)):
        return Line("row security", State.BAD, f"missing: {_some(missing)}", BY_HAND)
    return Line("row security", State.OK, f"on, {len(policies)} policies in place")


def transactions_line(oldest: Mapping[str, Any] | None, *, sees: bool = True) -> Line:
    """Whether something holds vacuum back; `sees` says that the sessions of all roles could be looked at."""
    seconds = 0.0 if oldest is None else float(oldest["seconds"])
    if oldest is None or seconds < OLD_TRANSACTION_SECONDS:
        if sees:
            return Line("transactions", State.OK, "none is open for long")
        advice = "Grant pg_read_all_stats to the owner of maskd.oldest_transaction()."
        return Line("transactions", State.WARN, "those of other roles are not shown", advice)
    who = f"{oldest['state']} {oldest['application'] or 'without a name'}, process {oldest['name']}"
    advice = (
        f"Dead rows stay as long as it is open, and claims slow down: end it (select pg_terminate_backend({oldest['name']}))."
    )
    if oldest["state"] == "prepared":
        advice = f"Dead rows stay meanwhile, and claims slow down; to end it: rollback prepared '{oldest['name']}'"
    return Line("transactions", State.WARN, f"one is open for {seconds / 60:.0f} minutes ({who})", advice)


def vacuum_line(facts: Mapping[str, Any]) -> Line:
    """Whether dead rows are cleared away."""
    dead, live = int(facts["dead"]), int(facts["live"])
    if not facts["on"]:
        advice = "Set autovacuum on, for the server and for public.segmentation_results."
        return Line("vacuum", State.BAD, f"autovacuum is off, {dead:,} dead rows", advice)
    if dead > DEAD_ROWS_MAX + live / 5:
        advice = "Look for old transactions, then run in SQL: vacuum analyze public.segmentation_results"
        return Line("vacuum", State.WARN, f"{dead:,} dead rows beside {live:,} live ones", advice)
    return Line("vacuum", State.OK, f"on, {dead:,} dead rows beside {live:,} live ones")


def clock_line(database: float, begun: float, ended: float) -> Line:
    """How far this host's clock is from the database's; the answer was made at some time between `begun` and `ended`."""
    skew, within = (begun + ended) / 2 - database, (ended - begun) / 2
    if abs(skew) - within <= SKEW_SECONDS_MAX:
        return Line("clock", State.OK, f"within {max(abs(skew), within):.1f} s of the database's")
    state = State.BAD if abs(skew) > SKEW_SECONDS_BAD else State.WARN
    way = "ahead of" if skew > 0 else "behind"
    advice = "Synchronise the clock (timedatectl set-ntp true): R2 refuses what is 15 minutes off, tickets expire by it."
    return Line("clock", state, f"{abs(skew):.0f} s {way} the database's", advice)


def kinds_line(status: Mapping[str, Any]) -> Line:
    """Whether somebody serves every kind, and above all those that wait."""
    paused = sorted(kind["kind"] for kind in status["kinds"] if kind["paused"])
    lonely = sorted(kind["kind"] for kind in status["kinds"] if not kind["served"] and not kind["paused"])
    waiting = sorted({row["kind"] for row in status["tasks"] if row["status"] == "pending"} & set(lonely))
    alive = sum(bool(worker["alive"]) for worker in status["workers"])
    held, go_on = (f"; paused: {_some(paused)}", " Paused kinds go on with: maskd resume") if paused else ("", "")
    if waiting:
        advice = "Start a worker that can (see weights), or their rows end as engine_unavailable."
        return Line("kinds", State.BAD, f"rows wait for {_some(waiting)}, which no live worker serves{held}", advice + go_on)
    if not alive:
        return Line(
            "kinds", State.WARN, f"no worker is alive{held}", f"Start one: maskd run.{go_on}" if go_on else "Start one: maskd run"
        )
    if lonely:
        advice = "Rows of them would end as engine_unavailable; a worker needs the weights, and MASKD_KINDS to allow it."
        return Line("kinds", State.WARN, f"nobody serves {_some(lonely)}{held}", advice + go_on)
    if paused:
        return Line("kinds", State.WARN, held.removeprefix("; "), go_on.strip())
    return Line(
        "kinds", State.OK, f"all {len(status['kinds'])} are served, {alive} {'worker' if alive == 1 else 'workers'} alive"
    )


async def wake_line(config: Config) -> Line:
    """How a worker would hear of rows, really tried."""
    sources = build_sources(config)
    if not sources:
        fact = f"by polling alone, every {config.poll_unproven_seconds:g} s: a transaction pooler cannot LISTEN"
        return Line("wake", State.WARN, fact, f"To be told at once, {LISTEN_HINT.partition(', or ')[2]}.")
    (source,) = sources
    begun = time.monotonic()
    try:
        await source.prove()
    except (UnavailableError, ConfigurationError) as error:
        advice = "Rows are found by polling meanwhile; look at the lines above."
        return Line("wake", State.BAD if isinstance(error, UnavailableError) else State.WARN, str(error), advice)
    what = "a notification came back" if source.name == "notify" else "Realtime listens to the table"
    return Line("wake", State.OK, f"push by {source.name}: {what}, {time.monotonic() - begun:.1f} s")


async def _open(store: TaskStore) -> str | None:
    """Open the store; what is lacking of its schema, if anything."""
    try:
        await store.open()
    except SchemaError as error:
        return str(error)
    return None


def _some(names: Sequence[str]) -> str:
    """The first few, and how many more."""
    more = f" and {len(names) - NAMED_MAX} more" if len(names) > NAMED_MAX else ""
    return ", ".join(names[:NAMED_MAX]) + more


def _fact_and_advice(sentence: str) -> tuple[str, str]:
    """A sentence that ends with its command, in two."""
    fact, _, command = sentence.partition("; run: ")
    return fact, f"Run: {command}" if command else RUN_MIGRATE


def _how_to_connect(config: Config, reason: str) -> str:
    """What to look at when there is no connection, or none of a role that may do anything."""
    if "42501" in reason:
        return "The server answers, but not this role: take the one that ran `maskd migrate`, or a member of service_role."
    if config.database_url is None:
        return "Look at SUPABASE_URL and SUPABASE_SERVICE_KEY, and whether this host gets out by HTTPS."
    host = urlsplit(config.database_dsn()).hostname or ""
    if host.startswith("db.") and host.endswith(".supabase.co"):
        return "The direct address has IPv6 only: from elsewhere take the session pooler (….pooler.supabase.com, port 5432)."
    return "Look at DATABASE_URL, the firewall, and whether the server runs."
