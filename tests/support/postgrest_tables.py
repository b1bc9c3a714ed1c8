"""What PostgREST makes of a request to a table: one SQL statement, and an answer of the rows that it gives.

Plain columns only: no embedding, casts, upserts or logic trees. Names and values are quoted; what is unknown is for the database
to refuse, under the caller's role.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from multidict import CIMultiDictProxy, MultiMapping

ROWS_MAX = 1000
SINGLE = "application/vnd.pgrst.object+json"
RESERVED = ("select", "order", "limit", "offset", "columns")
OPERATORS = {"eq": "=", "neq": "<>", "gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class Refusal(Exception):  # noqa: N818 - an answer, not a fault of the stand-in
    """An answer that is an error."""

    def __init__(self, status: int, code: str | None, message: str, details: str | None = None, hint: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"code": code, "message": message, "details": details, "hint": hint}
        if code is None:  # the gateway's own form
            self.body = {"message": message, "hint": hint}


@dataclass(frozen=True, slots=True)
class Answer:
    """An HTTP answer with a JSON text, or none."""

    status: int
    text: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TableCall:
    """A request to a table. `statement` gives one JSON text a row, `count` (if asked for) the number without limit and offset."""

    method: str
    statement: str
    count: str | None
    offset: int
    rows_wanted: bool
    single: bool

    @classmethod
    def of(cls, method: str, table: str, query: MultiMapping[str], headers: CIMultiDictProxy[str], body: str) -> TableCall:
        """The call that a request asks for. Raises Refusal."""
        prefer = ",".join(headers.getall("Prefer", []))
        rows_wanted = method in ("GET", "HEAD") or "return=representation" in prefer
        where = _where(query)
        columns = ", ".join("*" if name == "*" else _name(name) for name in query.get("select", "*").split(","))
        limit, offset = _range(query, headers)
        target = f"public.{_name(table)}"
        if method in ("GET", "HEAD"):
            statement = f"select {columns} from {target}{where}{_order(query)} limit {limit} offset {offset}"
        elif method == "POST":
            statement = _insert(target, query, _objects(body))
        elif method == "PATCH":
            statement = _update(target, _objects(body)[0]) + where
        elif method == "DELETE":
            statement = f"delete from {target}{where}"
        else:
            raise Refusal(405, "PGRST117", f"Unsupported HTTP method: {method}")
        if rows_wanted:
            returning = "" if method in ("GET", "HEAD") else f" returning {columns}"
            statement = f"with _ as ({statement}{returning}) select to_json(_)::text from _"
        count = f"select count(*) from {target}{where}" if "count=exact" in prefer else None
        return cls(method, statement, count, offset, rows_wanted, SINGLE in headers.get("Accept", ""))

    def answer(self, rows: Sequence[str], total: int | None) -> Answer:
        """What is answered when the statement gave these rows. Raises Refusal."""
        if self.single and self.rows_wanted and len(rows) != 1:
            message = "Cannot coerce the result to a single JSON object"
            raise Refusal(406, "PGRST116", message, f"The result contains {len(rows)} rows")
        text = (rows[0] if self.single else f"[{','.join(rows)}]") if self.rows_wanted else ""
        if self.method not in ("GET", "HEAD"):
            return Answer(201 if self.method == "POST" else 200 if self.rows_wanted else 204, text)
        if total is not None and self.offset > total:
            details = f"An offset of {self.offset} was requested, but there are only {total} rows."
            raise Refusal(416, "PGRST103", "Requested range not satisfiable", details)
        span = f"{self.offset}-{self.offset + len(rows) - 1}" if rows else "*"
        partly = total is not None and len(rows) < total
        return Answer(206 if partly else 200, text, {"Content-Range": f"{span}/{'*' if total is None else total}"})


def _where(query: MultiMapping[str]) -> str:
    terms = [_term(name, value) for name, value in query.items() if name not in RESERVED]
    return f" where {' and '.join(terms)}" if terms else ""


def _term(name: str, text: str) -> str:
    """One condition: `eq.5`, `in.(a,b)`, `is.null`, `not.is.null`."""
    operator, _, value = text.removeprefix("not.").partition(".")
    column = _name(name)
    if operator in OPERATORS:
        term = f"{column} {OPERATORS[operator]} {_value(value)}"
    elif operator == "in" and value.startswith("(") and value.endswith(")"):
        values = [_value(each.strip('"')) for each in value[1:-1].split(",")]
        term = f"{column} in ({', '.join(values)})"
    elif operator == "is" and value in ("null", "true", "false"):
        term = f"{column} is {value}"
    else:
        raise Refusal(400, "PGRST100", f'"failed to parse filter ({text})" (line 1, column 1)')
    return f"not ({term})" if text.startswith("not.") else term


def _order(query: MultiMapping[str]) -> str:
    """`created_at.desc,id` and the like."""
    parts = [part.split(".") for part in query.get("order", "").split(",") if part]
    words = {"asc": "asc", "desc": "desc", "nullsfirst": "nulls first", "nullslast": "nulls last"}
    if any(word not in words for part in parts for word in part[1:]):
        raise Refusal(400, "PGRST100", f'"failed to parse order ({query["order"]})" (line 1, column 1)')
    terms = [" ".join([_name(part[0]), *(words[word] for word in part[1:])]) for part in parts]
    return f" order by {', '.join(terms)}" if terms else ""


def _range(query: MultiMapping[str], headers: CIMultiDictProxy[str]) -> tuple[int, int]:
    """(limit, offset), by parameters or by the Range header."""
    first, _, last = headers.get("Range", "").partition("-")
    limit = int(last) - int(first) + 1 if last else ROWS_MAX
    return min(int(query.get("limit", limit)), ROWS_MAX), int(query.get("offset", first or 0))


def _objects(body: str) -> list[dict[str, Any]]:
    try:
        found = json.loads(body)
    except ValueError as error:
        raise Refusal(400, "PGRST102", "Empty or invalid json") from error
    objects = found if isinstance(found, list) else [found]
    if not objects or any(not isinstance(each, dict) or set(each) != set(objects[0]) for each in objects):
        raise Refusal(400, "PGRST102", "All object keys must match")
    return objects


def _insert(target: str, query: MultiMapping[str], objects: Sequence[Mapping[str, Any]]) -> str:
    named = [name.strip('"') for name in query["columns"].split(",")] if query.get("columns") else list(objects[0])
    columns = ", ".join(_name(name) for name in named)
    return f"insert into {target} ({columns}) select {columns} from {_records(target, objects)}"


def _update(target: str, changes: Mapping[str, Any]) -> str:
    values = [f"{_name(name)} = (select {_name(name)} from {_records(target, [changes])})" for name in changes]
    return f"update {target} set {', '.join(values)}"


def _records(target: str, objects: Sequence[Mapping[str, Any]]) -> str:
    """The objects as rows, each value by its column's type."""
    return f"json_populate_recordset(null::{target}, {_value(json.dumps(objects))}) _"


def _name(name: str) -> str:
    return '"' + name.strip().strip('"').replace('"', '""') + '"'


def _value(text: str) -> str:
    if "\0" in text:
        raise Refusal(400, "22P05", "unsupported Unicode escape sequence")
    return "'" + text.replace("'", "''") + "'"
