"""The queue at a glance, drawn: what `maskd status` prints once and `maskd watch` again and again.

Enters: what `maskd.status()` says. Leaves: something that rich prints, no wider than the terminal and, when a height is given, no
higher. Draws only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from daemon.progress import plain

WIDE = 110
COUNTED_MAX = 100_000
"""What maskd.status() counts of each status."""
ERRORS_MIN = 2
RUNNING_SECONDS_MIN = 2.0
"""What runs for less than that is not worth a line, unless it tells how far it is."""
Found = Mapping[str, Any]


def board(found: Found, width: int, height: int | None = None, note: Text | None = None) -> RenderableType:
    """All of it. `note` comes last, whatever else finds room. Names and messages are others': no markup, nothing that steers."""
    found = _harmless(found)
    kinds, workers, running = _kinds(found), found["workers"], _running(found)
    left = 10_000 if height is None else height - 1 - (0 if note is None else 2)
    parts: list[RenderableType] = [_headline(found, width)]
    sections: list[tuple[str, Sequence[Any], Callable[[Sequence[Any], int], Table]]] = [
        ("", kinds, _kind_table),
        ("workers", workers, _worker_table),
        ("running", running, _running_table),
        ("last errors", found["errors"], _error_table),
    ]
    for title, lines, table in sections:
        reserve = 0 if title == "last errors" or not found["errors"] else ERRORS_MIN + 2
        room = left - reserve - 2  # an empty line and the head
        if not lines or room < 1:
            continue
        most = min(len(lines), room)
        parts += [Text(""), table(lines[:most], width)]
        left -= most + 2
        if title == "workers" and (stages := _stages(workers, width)) is not None and left > reserve:
            parts.append(stages)
            left -= 1
    if height is not None:
        parts += [Text("")] * max(left, 0)
    return Group(*parts, *([] if note is None else [Text(""), note]))


def _harmless(found: Any) -> Any:
    """The same with every string fit to be shown."""
    if isinstance(found, str):
        return plain(found)
    if isinstance(found, Mapping):
        return {plain(str(name)): _harmless(value) for name, value in found.items()}
    return [_harmless(value) for value in found] if isinstance(found, list) else found


def lonely(found: Found) -> list[str]:
    """Kinds that wait and that no live worker serves."""
    unserved = {kind["kind"] for kind in found["kinds"] if not kind["served"]}
    return sorted({row["kind"] for row in found["tasks"]} & unserved)


def paused(found: Found) -> list[str]:
    """Kinds that are held back."""
    return [kind["kind"] for kind in found["kinds"] if kind["paused"]]


def _headline(found: Found, width: int) -> Text:
    waiting = sum(row["count"] for row in found["tasks"] if row["status"] != "processing")
    capped = any(row["count"] >= COUNTED_MAX for row in found["tasks"])
    rates = found.get("rates", [])
    done, failed = (sum(row[name] for row in rates) for name in ("done_per_second", "failed_per_second"))
    alive = sum(worker["alive"] for worker in found["workers"])
    text = Text("maskd", style="bold", no_wrap=True, overflow="ellipsis")
    text.append(f"  {waiting:,}{'+' if capped else ''} waiting", style="not bold")
    text.append(f"   {_rate(done)} done", style="not bold")
    text.append(f"   {_rate(failed)} failed", style="not bold red" if failed else "not bold")
    text.append(f"   {alive} {'worker' if alive == 1 else 'workers'}", style="not bold" if alive else "not bold red")
    if width >= WIDE and (held := paused(found)):
        text.append(f"   paused: {', '.join(held)}", style="not bold magenta")
    return text


def _kinds(found: Found) -> list[dict[str, Any]]:
    """A line per kind that has something to show."""
    rates = {row["kind"]: row for row in found.get("rates", [])}
    counts: dict[str, dict[str, Any]] = {}
    for row in found["tasks"]:
        counts.setdefault(row["kind"], {})[row["status"]] = row
    held, alone = set(paused(found)), set(lonely(found))
    return [
        {
            "kind": kind,
            **{status: counts.get(kind, {}).get(status, {}).get("count", 0) for status in ("pending", "processing")},
            "later": sum(counts.get(kind, {}).get(status, {}).get("count", 0) for status in ("delayed", "waiting")),
            "oldest": counts.get(kind, {}).get("pending", {}).get("oldest_seconds"),
            "rate": rates.get(kind, {}),
            "note": ("paused", "magenta") if kind in held else ("no worker", "red") if kind in alone else ("", ""),
        }
        for kind in sorted({*counts, *rates, *held})
    ]


def _kind_table(kinds: Sequence[Mapping[str, Any]], width: int) -> Table:
    wide = width >= WIDE
    more = (["failed/s"], ["95 %"]) if wide else ([], [])
    table = _table(("kind", 0), "waiting", "running", "later", "oldest", "done/s", *more[0], "median", *more[1], ("", 0))
    table.columns[0].no_wrap = False  # where there is no room for all, names give way, and never what is wrong
    for kind in kinds:
        rate, (note, style) = kind["rate"], kind["note"]
        failed = rate.get("failed_per_second", 0)
        _row(
            table,
            Text(kind["kind"], style=style or "bold", no_wrap=True, overflow="ellipsis"),
            _count(kind["pending"]),
            _count(kind["processing"]),
            _count(kind["later"]),
            _age(kind["oldest"]),
            _rate(rate.get("done_per_second", 0), ""),
            *([Text(_rate(failed, ""), style="red" if failed else "")] if wide else []),
            _age(rate.get("seconds_p50")),
            *([_age(rate.get("seconds_p95"))] if wide else []),
            Text(note, style=style),
        )
    return table


def _worker_table(workers: Sequence[Mapping[str, Any]], width: int) -> Table:
    wide = width >= WIDE
    gpu = [("gpu memory", 0)] if any(worker["info"].get("gpus") for worker in workers) else []
    kinds = [("kinds", 2 if wide else 0)]
    table = _table(("worker", 0), ("host", 1), ("version", 0), ("wake", 0), ("busy", 0), "held", *gpu, "beat", *kinds)
    for worker in workers:
        info, names = worker["info"], worker["kinds"]
        _row(
            table,
            worker["id"][:8],
            info.get("host", ""),
            info.get("version", ""),
            _wake(info),
            _busy(info),
            _count(sum(each["held"] for each in info.get("load", {}).values())),
            *([_memory(info)] if gpu else []),
            Text(_age(worker["silent_seconds"]), style="" if worker["alive"] else "bold red"),
            Text(", ".join(names) if wide else str(len(names)), style="dim" if wide else ""),
        )
    return table


def _wake(info: Mapping[str, Any]) -> Text:
    """How it learns of work, or what it does not reach."""
    if info.get("failing"):
        return Text(f"no {', '.join(info['failing'])}", style="red")
    mode = info.get("wake", "")
    return Text(mode, style="" if mode == "push" else "magenta")


def _busy(info: Mapping[str, Any]) -> str:
    """Per pool how many of its places work."""
    loads = info.get("load", {}).items()
    lost = {pool: f" lost {load['lost']}" if load["lost"] else "" for pool, load in loads}
    return ", ".join(f"{pool} {load['busy']}/{load['slots']}{lost[pool]}" for pool, load in loads)


def _memory(info: Mapping[str, Any]) -> str:
    return ", ".join(f"{each['used_mb'] / 1024:.1f}/{each['total_mb'] / 1024:.0f} GB" for each in info.get("gpus", {}).values())


def _stages(workers: Sequence[Mapping[str, Any]], width: int) -> Text | None:
    """Each stage's median (the workers' mean) and 95th percentile (the slowest worker's)."""
    every: dict[str, list[Mapping[str, float]]] = {}
    for worker in workers:
        for stage, times in worker["info"].get("stages", {}).items() if worker["alive"] else ():
            every.setdefault(stage, []).append(times)
    if not every:
        return None
    text = Text("stages", style="dim", no_wrap=True, overflow="ellipsis")
    for stage, times in every.items():
        median, slow = sum(each["p50_ms"] for each in times) / len(times), max(each["p95_ms"] for each in times)
        text.append(f"  {stage} ", style="not dim").append(_span(median, slow), style="not dim bold")
    return text.append("  (median/95 %)" if width >= WIDE else "")


def _running(found: Found) -> list[dict[str, Any]]:
    every = [
        {**run, "host": worker["info"].get("host", "")}
        for worker in found["workers"]
        for run in worker["info"].get("running", [])
    ]
    shown = [run for run in every if run["share"] is not None or run["seconds"] >= RUNNING_SECONDS_MIN]
    return sorted(shown, key=lambda run: -run["seconds"])


def _running_table(running: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = _table(("running", 0), ("task", 0), ("", 0), "done", "for", ("host", 1))
    for run in running:
        share = run["share"]
        bar: RenderableType = "" if share is None else _bar(share, width)
        more = f" +{run['tasks'] - 1}" if run["tasks"] > 1 else ""
        done = "-" if share is None else f"{share:.0%}"
        _row(table, run["kind"], run["id"][:8] + more, bar, done, _age(run["seconds"]), run["host"])
    return table


def _bar(share: float, width: int) -> ProgressBar:
    length = min(width // 4, 40)
    return ProgressBar(1.0, share, length, style="bright_black", complete_style="green", finished_style="green")


def _error_table(errors: Sequence[Mapping[str, Any]], width: int) -> Table:
    table = _table(("last errors", 0), ("kind", 0), ("task", 0), "ago", ("message", 1))
    table.columns[1].max_width = 20  # whoever inserts a task may call its kind anything
    for error in errors:
        _row(
            table,
            Text(error["code"] or "?", style="red"),
            error["kind"],
            str(error["id"]) if width >= WIDE else error["id"][:8],
            _age(error.get("ago_seconds")),
            error["message"] or "",
        )
    return table


def _table(*columns: str | tuple[str, int]) -> Table:
    """Numbers to the right; a column of words is given with how eagerly it takes the room that is left."""
    table = Table(
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
        header_style="dim",
        expand=any(isinstance(column, tuple) and column[1] for column in columns),
    )
    for column in columns:
        if isinstance(column, str):
            table.add_column(column, justify="right", no_wrap=True)
        else:
            table.add_column(column[0], ratio=column[1] or None, no_wrap=True, overflow="ellipsis")
    return table


def _row(table: Table, *cells: RenderableType) -> None:
    """A line; of a plain string rich would read tags."""
    table.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in cells))


def _count(number: int) -> str:
    return "-" if not number else f"{number:,}" + ("+" if number >= COUNTED_MAX else "")


def _rate(per_second: float, unit: str = "/s") -> str:
    if not per_second:
        return f"0{unit}" if unit else "-"
    return (f"{per_second:.2f}" if per_second < 10 else f"{per_second:,.0f}") + unit


def _span(low_ms: float, high_ms: float) -> str:
    if high_ms < 1000:
        return f"{low_ms:.0f}/{high_ms:.0f} ms"
    digits = 1 if high_ms < 10_000 else 0
    return f"{low_ms / 1000:.{digits}f}/{high_ms / 1000:.{digits}f} s"


def _age(seconds: float | None) -> str:
    """A time span for a person."""
    if seconds is None:
        return "-"
    seconds = max(seconds, 0.0)  # a clock may have been set back
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
