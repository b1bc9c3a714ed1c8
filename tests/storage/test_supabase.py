"""The store over HTTP: what each refusal means, replies that get lost, and a key that is never shown."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import anyio
import pytest
from support.database import Database
from support.front import front
from support.postgrest import PostgrestServer, postgrest
from support.stores import Queue, new_id
from support.tokens import PUBLISHABLE_KEY, SERVICE_KEY, token

from daemon.lease import rest_seconds
from storage import rpc
from storage.base import Beat, ConfigurationError, Fate, Outcome, RefusedError, UnavailableError, UnknownFunctionError
from storage.rpc import translate
from storage.schema import migration_files, plain_file
from storage.supabase import SupabaseStore

pytestmark = pytest.mark.anyio

SIDE = """
select has_function_privilege($1, p.oid, 'execute') from pg_proc p join pg_namespace n on n.oid = p.pronamespace
 where n.nspname = 'public' and p.proname like 'maskd%'
"""


@pytest.fixture
def server(database: Database) -> Iterator[PostgrestServer]:
    with postgrest(database.dsn) as running:
        yield running


@pytest.fixture
async def queue(database: Database, server: PostgrestServer) -> AsyncIterator[Queue]:
    opened = await Queue.open(database, SupabaseStore(server.url, SERVICE_KEY, timeout_seconds=2))
    yield opened
    await opened.close()


async def refusal(server: PostgrestServer, key: str) -> str:
    store = SupabaseStore(server.url, key)
    with pytest.raises(ConfigurationError) as caught:
        await store.open()
    return str(caught.value)


async def test_a_legacy_service_token_is_as_good_as_a_secret_key(server: PostgrestServer) -> None:
    store = SupabaseStore(server.url + "/", token(role="service_role"))
    await store.open()
    assert await store.key_templates()
    await store.close()


async def test_a_wrong_key_is_a_configuration_error_that_does_not_show_it(server: PostgrestServer) -> None:
    said = await refusal(server, "sb_secret_of-somebody-else")
    assert "SUPABASE_SERVICE_KEY" in said
    assert "of-somebody-else" not in said


@pytest.mark.parametrize("key", [PUBLISHABLE_KEY, "authenticated"])
async def test_a_key_that_is_no_service_key_may_call_nothing(server: PostgrestServer, key: str) -> None:
    assert "42501" in await refusal(server, token(role=key) if key == "authenticated" else key)


async def test_a_database_without_the_functions_names_the_command_that_mends_it(empty_database: Database) -> None:
    empty_database.execute("do $$ begin create role service_role nologin bypassrls; exception when duplicate_object then end $$")
    with postgrest(empty_database.dsn) as server:
        assert "maskd migrate" in await refusal(server, SERVICE_KEY)


async def test_a_database_that_lacks_a_migration_names_the_command_that_mends_it(
    server: PostgrestServer, database: Database
) -> None:
    database.execute("delete from maskd.migrations where name = 'paint'")
    assert "20261121000600; run: maskd migrate" in await refusal(server, SERVICE_KEY)


@pytest.mark.parametrize(("role", "may"), [("anon", False), ("authenticated", False), ("service_role", True)])
async def test_only_the_service_may_execute_the_functions_even_where_everybody_was_granted_everything(
    empty_database: Database, role: str, may: bool
) -> None:
    empty_database.execute(plain_file().read_text())
    empty_database.execute("alter default privileges grant execute on functions to anon, authenticated")
    for file in migration_files():
        empty_database.execute(file.read_text())
    sql = await empty_database.connect()
    found = [row[0] for row in await sql.fetch(SIDE, role)]
    await sql.close()
    assert len(found) == 30
    assert set(found) == {may}


@pytest.mark.parametrize("function", ["maskd_claim", "maskd_settle", "maskd_beat"])
async def test_a_reply_lost_after_the_commit_is_made_good_by_asking_again(
    queue: Queue, server: PostgrestServer, function: str
) -> None:
    await queue.insert(5)
    server.faults.lose_replies[function] = 1
    worker = new_id()
    tasks = await queue.claim(worker)
    assert len(tasks) == 5
    assert await queue.beat(worker, tasks) == []
    assert set((await queue.settle(tasks)).values()) <= {"already"}
    assert server.faults.lost == 1
    assert await queue.statuses() == {"done": 5}


async def test_a_claim_whose_replies_were_all_lost_is_found_again_by_its_token(queue: Queue, server: PostgrestServer) -> None:
    ids = await queue.insert(5)
    worker, name = new_id(), new_id()
    server.faults.lose_replies["maskd_claim"] = 2
    with pytest.raises(UnavailableError):
        await queue.claim(worker, token=name)
    assert {task.id for task in await queue.claim(worker, token=name)} == set(ids)


@pytest.mark.parametrize("fault", ["503", "502", "PGRST000", "57014", "black hole", "slow"])
async def test_what_passes_is_told_as_away_within_the_time_out_and_the_store_goes_on_afterwards(
    queue: Queue, server: PostgrestServer, fault: str
) -> None:
    faults = server.faults
    if fault.startswith("50"):
        faults.status = int(fault)
    elif fault in ("PGRST000", "57014"):
        faults.error = (503 if fault == "PGRST000" else 500, {"code": fault, "message": "no", "details": None, "hint": None})
    faults.black_hole = fault == "black hole"
    faults.delay_seconds = 60 if fault == "slow" else 0
    begun = time.monotonic()
    with pytest.raises(UnavailableError):
        await queue.store.probe()
    assert time.monotonic() - begun < 20
    faults.status = faults.error = None
    faults.black_hole, faults.delay_seconds = False, 0
    await queue.store.probe()


async def test_nobody_there_is_away_not_a_mistake() -> None:
    with pytest.raises(UnavailableError):
        await SupabaseStore("http://127.0.0.1:9", SERVICE_KEY).open()


@pytest.mark.parametrize("url", ["", "nowhere", "ftp://x"])
async def test_an_address_that_is_none_is_a_configuration_error(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        await SupabaseStore(url, SERVICE_KEY).open()
    assert SERVICE_KEY not in str(caught.value)


@pytest.mark.parametrize(
    "values", ['{"metadata": {"x": NaN}}', '{"metadata": {"x": "\\ud800"}}', '{"metadata": {"x": "\\u0000"}}']
)
async def test_values_that_json_or_postgres_cannot_hold_are_refused(queue: Queue, values: str) -> None:
    await queue.insert()
    (task,) = await queue.claim(new_id())
    with pytest.raises(RefusedError):
        await queue.store.settle([Outcome(task.id, task.token, Fate.DONE, values)])


async def test_calls_overlap_and_a_cancelled_one_does_no_harm(queue: Queue, server: PostgrestServer) -> None:
    server.faults.delay_seconds = 0.2
    with anyio.move_on_after(0.05):
        await queue.store.probe()
    async with anyio.create_task_group() as tasks:
        for _ in range(12):
            tasks.start_soon(queue.store.probe)
    assert server.calls["maskd_version"] >= 12


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (401, "PGRST301", ConfigurationError),
        (401, "", ConfigurationError),
        (403, "42501", ConfigurationError),
        (404, "PGRST202", UnknownFunctionError),
        (404, "", ConfigurationError),
        (308, "", ConfigurationError),
        (503, "PGRST002", UnavailableError),
        (504, "PGRST003", UnavailableError),
        (500, "40001", UnavailableError),
        (500, "40P01", UnavailableError),
        (503, "53300", UnavailableError),
        (405, "25006", UnavailableError),
        (429, "", UnavailableError),
        (540, "", UnavailableError),
        (400, "22P05", RefusedError),
        (413, "", RefusedError),
        (400, "P0001", RefusedError),
    ],
)
def test_each_code_has_its_class(status: int, code: str, kind: type[Exception]) -> None:
    assert type(translate(status, code, "sentence")) is kind


async def test_nothing_that_the_store_raises_or_logs_holds_the_key(
    queue: Queue, server: PostgrestServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    said = []
    for error in ((400, "22P02"), (403, "42501"), (503, "PGRST001")):
        server.faults.error = (error[0], {"code": error[1], "message": f"no: {SERVICE_KEY}", "details": None, "hint": None})
        with pytest.raises((RefusedError, ConfigurationError, UnavailableError)) as caught:
            await queue.store.probe()
        said.append(f"{caught.value!r} {caught.value.__cause__!r}")
    assert not re.search(re.escape(SERVICE_KEY), "\n".join([*said, *(record.getMessage() for record in caplog.records)]))


CALLS: dict[str, Callable[[SupabaseStore], Awaitable[object]]] = {
    "claim": lambda it: it.claim(new_id(), new_id(), ["segment_visual"], 5),
    "claim_suspects": lambda it: it.claim_suspects(new_id(), new_id(), ["segment_visual"], 5),
    "settle": lambda it: it.settle([]),
    "beat": lambda it: it.beat(Beat(new_id(), 30.0, {}, [])),
    "tend": lambda it: it.tend(new_id(), 30.0, 600.0, 10, 20.0),
    "rescue": lambda it: it.rescue(new_id(), 600.0),
    "bury": lambda it: it.bury(new_id(), []),
    "leave": lambda it: it.leave(new_id()),
    "due_tombstones": lambda it: it.tombstones(10),
    "bury_tombstones": lambda it: it.bury_tombstones([]),
    "masks_of": lambda it: it.masks_of(new_id(), new_id()),
    "owner_of": lambda it: it.owner_of(new_id()),
    "key_templates": lambda it: it.key_templates(),
    "status": lambda it: it.status(),
    "version": lambda it: it.probe(),
}


@pytest.fixture
async def store(server: PostgrestServer) -> AsyncIterator[SupabaseStore]:
    made = SupabaseStore(server.url, SERVICE_KEY, timeout_seconds=5)
    await made.open()
    yield made
    await made.close()


@pytest.mark.parametrize(
    "text", ['{"tasks": [{"id"', "", '{"message": "hello"}', '[{"message": "hello"}]', '{"tasks": 7}', "[7]", "true "]
)
async def test_a_success_that_makes_no_sense_is_an_outage_and_never_an_answer(
    store: SupabaseStore, server: PostgrestServer, text: str
) -> None:
    server.faults.text = text
    taken = []
    for name, call in CALLS.items():
        try:
            await call(store)
        except UnavailableError:
            continue
        taken.append(name)
    fits = {"true ": ["rescue", "bury", "leave", "bury_tombstones"], "[7]": ["key_templates"]}  # a list of settings, a count
    assert set(taken) <= set(fits.get(text, ["key_templates"] if text.startswith("[{") else []))


async def test_every_function_bears_a_lost_reply(store: SupabaseStore, server: PostgrestServer) -> None:
    server.faults.lose_replies = {f"maskd_{name}": 1 for name in CALLS}
    for call in CALLS.values():
        await call(store)
    assert server.faults.lost == len(CALLS)
    assert {server.calls[f"maskd_{name}"] for name in CALLS} == {2}


async def test_an_answer_without_an_end_is_cut_off(
    store: SupabaseStore, server: PostgrestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc, "REPLY_BYTES_MAX", 1 << 22)
    server.faults.endless = True
    with pytest.raises(UnavailableError, match="larger"):
        await store.probe()
    server.faults.endless = False
    await store.probe()


async def test_a_function_that_is_not_known_yet_is_told_from_other_refusals(
    store: SupabaseStore, server: PostgrestServer
) -> None:
    server.faults.unknown = {"maskd_version"}
    with pytest.raises(UnknownFunctionError, match="maskd migrate"):
        await store.probe()


async def test_calls_share_a_few_connections_and_keep_them(database: Database, server: PostgrestServer) -> None:
    with front("127.0.0.1", int(server.url.rpartition(":")[2])) as before:
        store = SupabaseStore(before.url, SERVICE_KEY)
        await store.open()
        async with anyio.create_task_group() as tasks:
            for _ in range(40):
                tasks.start_soon(store.probe)
        for _ in range(10):
            await store.probe()
        await store.close()
        assert before.counts["connections"] <= rpc.CONNECTIONS_MAX
    assert rest_seconds(30.0, None) * 3 < rpc.KEEP_SECONDS, "a connection outlives the rest of an idle daemon, and a missed call"


async def test_a_call_of_a_daemon_at_rest_is_small(queue: Queue, server: PostgrestServer) -> None:
    """Headers are most of it. Three calls a minute of this and as much again by the gateway are less than 10 MB a day."""
    worker = new_id()
    with front("127.0.0.1", int(server.url.rpartition(":")[2])) as before:
        store = SupabaseStore(before.url, SERVICE_KEY)
        await store.open()
        await store.beat(Beat(worker, 30.0, {"host": "h" * 200}, ["k" * 20] * 9))
        counted = before.counts["rest"]
        assert await store.tend(worker, 30.0, 600.0, 10, 20.0) is not None
        await store.close()
        assert before.counts["rest"] - counted < 1000
