"""The contract for who inserts by hand: the real supabase-js with a user's token, straight on the tables, and Realtime back."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.database import Database
from support.edge import FOLDER, WHY_NOT, SupabaseJs, supabase_js
from support.realtime_server import supabase
from support.site import Queue
from support.tokens import AUTH

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)
CREDITS = 20  # signup.sql
ROWS = ["from", "segmentation_results"]
BACK = ["select", "id, status, charged, error"]


@dataclass(frozen=True, slots=True)
class Caller:
    """A user with a project, and the library with their token."""

    queue: Queue
    js: SupabaseJs
    url: str
    id: str
    project: str

    def insert(self, back: list[str] | None = BACK, **row: Any) -> dict[str, Any]:
        row = {"project_id": self.project, "kind": "segment_concept", "text_prompt": "cat"} | row
        return self.js.ask(ROWS, ["insert", row], *([back] if back else []))

    def stored(self) -> list[dict[str, Any]]:
        return self.queue.ask(
            "select id::text, status, charged from public.segmentation_results where project_id = %s", self.project
        )

    @property
    def credits(self) -> int:
        return int(self.queue.one("select credits from public.users_profile where id = %s", self.id))


@pytest.fixture(scope="module")
def caller(module_database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Caller]:
    module_database.execute((FOLDER / "signup.sql").read_text())
    queue = Queue(module_database.dsn)
    user, project = queue.owner()
    log = tmp_path_factory.mktemp("supabase-js") / "log"
    with supabase(module_database.dsn) as (rpc, _realtime), supabase_js(rpc.url, AUTH.token(user, rpc.url), log) as js:
        yield Caller(queue, js, rpc.url, user, project)
    queue.close()


@pytest.fixture(autouse=True)
def fresh(caller: Caller) -> None:
    caller.queue.ask("delete from public.segmentation_results where project_id = %s", caller.project)
    caller.queue.ask("update public.users_profile set credits = %s where id = %s", CREDITS, caller.id)


def refusal(reply: dict[str, Any]) -> tuple[int, str]:
    assert reply["data"] is None
    return reply["status"], reply["error"]["code"]


def test_an_inserted_row_is_taken_in_and_charged(caller: Caller) -> None:
    made = caller.insert(source_image_url=f"uploads/{caller.id}/cat.jpg")
    assert made["status"] == 201
    (row,) = made["data"]
    assert (row["status"], row["charged"], row["error"]) == ("pending", 1, None)
    assert caller.credits == CREDITS - 1
    assert caller.insert(back=None)["status"] == 201
    read = caller.js.ask(
        ROWS, ["select", "id, status", {"count": "exact"}], ["eq", "project_id", caller.project], ["range", 0, 0]
    )
    assert (len(read["data"]), read["count"], read["status"]) == (1, 2, 206)


def test_all_columns_cannot_be_asked_for_since_some_are_not_for_users(caller: Caller) -> None:
    assert refusal(caller.js.ask(ROWS, ["select"])) == (403, "42501")
    assert refusal(caller.insert(back=["select"])) == (403, "42501")
    assert caller.stored() == []


@pytest.mark.parametrize(
    "column", ["charged", "priority", "user_id", "mask_image_url", "metadata", "claim_token", "max_attempts"]
)
def test_what_a_user_may_not_choose_is_refused(caller: Caller, column: str) -> None:
    assert refusal(caller.insert(**{column: None})) == (403, "42501")


def test_a_status_that_a_user_chooses_does_not_count(caller: Caller) -> None:
    (row,) = caller.insert(status="done")["data"]
    assert (row["status"], row["charged"]) == ("pending", 1)


def test_nothing_of_a_row_can_be_changed_afterwards(caller: Caller) -> None:
    (row,) = caller.insert()["data"]
    assert refusal(caller.js.ask(ROWS, ["update", {"status": "done"}], ["eq", "id", row["id"]])) == (403, "42501")
    assert [each["status"] for each in caller.stored()] == ["pending"]


def test_an_impossible_row_is_stored_as_an_error_and_costs_nothing(caller: Caller) -> None:
    (row,) = caller.insert(source_image_url="uploads/somebody-else/cat.jpg")["data"]
    assert (row["status"], row["error"]["code"], row["charged"]) == ("error", "image_url_forbidden", 0)
    assert caller.credits == CREDITS


def test_one_idempotency_key_makes_one_row(caller: Caller) -> None:
    assert caller.insert(idempotency_key="once")["status"] == 201
    assert refusal(caller.insert(idempotency_key="once")) == (409, "23505")
    assert (len(caller.stored()), caller.credits) == (1, CREDITS - 1)


def test_without_credits_nothing_is_stored(caller: Caller) -> None:
    caller.queue.ask("update public.users_profile set credits = 0 where id = %s", caller.id)
    refused = caller.insert()
    assert refusal(refused) == (402, "PT402")
    assert refused["error"]["details"] == "credits_missing"
    assert caller.stored() == []


def test_several_rows_at_once_are_all_paid_or_none_is_made(caller: Caller) -> None:
    rows = [{"project_id": caller.project, "kind": "segment_concept", "text_prompt": word} for word in ("cat", "dog", "bird")]
    caller.queue.ask("update public.users_profile set credits = 2 where id = %s", caller.id)
    assert refusal(caller.js.ask(ROWS, ["insert", rows], BACK)) == (402, "PT402")
    assert (caller.stored(), caller.credits) == ([], 2)
    caller.queue.ask("update public.users_profile set credits = 3 where id = %s", caller.id)
    assert [row["status"] for row in caller.js.ask(ROWS, ["insert", rows], BACK)["data"]] == ["pending"] * 3
    assert caller.credits == 0


def test_a_deleted_row_that_waited_is_refunded(caller: Caller) -> None:
    (row,) = caller.insert()["data"]
    assert caller.js.ask(ROWS, ["delete"], ["eq", "id", row["id"]])["status"] == 204
    assert (caller.stored(), caller.credits) == ([], CREDITS)


def test_others_are_neither_seen_nor_served_nor_deleted(caller: Caller) -> None:
    other, project = caller.queue.owner()
    made = caller.queue.one(
        "insert into public.segmentation_results (project_id, kind) values (%s, 'segment_visual') returning id::text", project
    )
    assert caller.js.ask(ROWS, ["select", "id"], ["eq", "id", made])["data"] == []
    assert caller.js.ask(ROWS, ["delete"], ["eq", "id", made], ["select", "id"])["data"] == []
    assert caller.js.ask(["from", "users_profile"], ["select", "id"], ["eq", "id", other], ["maybeSingle"])["data"] is None
    assert refusal(caller.insert(project_id=project)) == (403, "42501")
    assert refusal(caller.js.ask(ROWS, ["select", "id"], ["eq", "id", str(uuid.uuid4())], ["single"])) == (406, "PGRST116")


def test_a_user_makes_projects_and_reads_the_profile_and_what_was_used(caller: Caller) -> None:
    made = caller.js.ask(["from", "projects"], ["insert", {"user_id": caller.id, "name": "cats"}], ["select"], ["single"])["data"]
    assert (made["user_id"], made["name"]) == (caller.id, "cats")
    assert caller.insert(project_id=made["id"])["status"] == 201
    profile = caller.js.ask(["from", "users_profile"], ["select", "tier, credits"], ["single"])["data"]
    assert profile == {"tier": "free", "credits": CREDITS - 1}
    used = caller.js.ask(
        ["from", "usage_logs"], ["select", "action, credits_used"], ["order", "created_at", {"ascending": False}]
    )
    assert used["data"][0] == {"action": "segment_concept", "credits_used": 1}
    refused = caller.js.ask(["from", "users_profile"], ["update", {"credits": 999}], ["eq", "id", caller.id])
    assert refusal(refused) == (403, "42501")


def test_a_user_hears_of_own_rows_as_they_change_and_of_no_others(caller: Caller) -> None:
    _other, project = caller.queue.owner()
    hidden = caller.queue.one(
        "insert into public.segmentation_results (project_id, kind) values (%s, 'segment_visual') returning id::text", project
    )
    (row,) = caller.insert()["data"]
    caller.js.say(["subscribe"])
    assert caller.js.next("state") == "SUBSCRIBED"
    assert caller.js.next("system")["status"] == "ok"
    caller.queue.ask("select maskd.cancel(array[%s::uuid])", hidden)
    caller.js.ask(["rpc", "cancel_segmentation", {"id": row["id"]}])
    heard = caller.js.next("change")
    assert (heard["eventType"], heard["new"]["id"], heard["new"]["status"]) == ("UPDATE", row["id"], "canceled")
    assert heard["errors"] is None
    assert not {"claim_token", "worker_id", "fair_rank"} & set(heard["new"])


def test_a_filter_by_project_leaves_out_the_other_projects_of_a_user(caller: Caller, tmp_path: Path) -> None:
    project = caller.queue.one("insert into public.projects (user_id, name) values (%s, 'two') returning id::text", caller.id)
    ids = [caller.insert(project_id=each)["data"][0]["id"] for each in (caller.project, project)]
    with supabase_js(caller.url, AUTH.token(caller.id, caller.url), tmp_path / "log") as js:
        js.say(["subscribe", f"project_id=eq.{project}"])
        assert js.next("system")["status"] == "ok"
        for task in ids:
            caller.js.ask(["rpc", "cancel_segmentation", {"id": task}])
        assert js.next("change")["new"]["id"] == ids[1]
