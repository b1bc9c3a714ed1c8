"""Alerts, dashboard and the scrape of Prometheus, held to what a real daemon tells and to Prometheus' own judgement."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from support.database import Database
from support.site import PHOTO_BOX, Site, site_on

from daemon import metrics

MONITORING = Path(__file__).resolve().parents[2] / "systemd" / "monitoring"
ALERTS = MONITORING / "alerts.yml"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
OF_PROMETHEUS = {"up": {"instance", "job"}}
ADDED_BY_PROMETHEUS = {"instance", "job"}
WORDS = "by|without|on|ignoring|and|or|unless|bool|offset|group_left|group_right"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not installed (Debian: apt install prometheus)"
)
Samples = dict[str, set[str]]


def promtool(*words: str, cwd: Path = MONITORING, given: str | None = None) -> None:
    """Run promtool; fails with what it says."""
    done = subprocess.run(["promtool", *words], cwd=cwd, input=given, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    """Every expression of the alerts and the dashboard, with Grafana's variables filled in."""
    alerts = re.findall(r"(?m)^        expr: (?:\|\n((?:          .*\n)+)|(.+))", ALERTS.read_text())
    found = [block or line for block, line in alerts]
    found += [target["expr"] for panel in PANELS for target in panel["targets"]]
    return [expr.replace("$__rate_interval", "1m").replace("$instance", ".*").strip() for expr in found]


def read(text: str) -> Samples:
    """By the name of a sample the labels that it has, of an exposition in text; families without samples have none."""
    found: Samples = {name: set() for name in re.findall(r"(?m)^# TYPE (\S+)", text)}
    for name, labels in re.findall(r"(?m)^([a-z]\w*)(?:\{(.*)\})? ", text):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    return found


def used(expr: str) -> tuple[set[str], set[str]]:
    """The metrics that an expression names, and the labels that it selects or groups by."""
    plain = re.sub(r'"[^"]*"', '""', expr)
    labels = {label for group in re.findall(r"\{([^}]*)\}", plain) for label in re.findall(r"(\w+)\s*[=!]", group)}
    grouped = re.findall(r"\b(?:by|on|ignoring|group_left|group_right)\s*\(([^)]*)\)", plain)
    labels |= {label for group in grouped for label in re.findall(r"\w+", group)}
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]|\b(?:by|on|ignoring|group_left|group_right)\s*\([^)]*\)", " ", plain)
    names = set(re.findall(r"\b([a-z_]\w*)\b(?!\s*\()", bare)) - set(WORDS.split("|"))
    return names, labels


@pytest.fixture(scope="module")
def site(module_database: Database, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with site_on(module_database, tmp_path_factory.mktemp("site")) as made:
        yield made


@pytest.fixture(scope="module")
def scrapes(site: Site) -> tuple[str, str]:
    """What a daemon tells before it has done anything, and after a task that ended well and one that did not."""
    with site.daemon(MASKD_METRICS_SECONDS="0.001") as daemon:
        before = daemon.get("/metrics")[1]
        ids = site.queue.insert("segment_visual", {"boxes": [PHOTO_BOX]}, site.photo)
        ids += site.queue.insert("segment_visual", {"boxes": [[5, 5, 1, 1]]}, site.photo)
        site.queue.finished(ids)
        site.queue.ask("insert into maskd.kinds (kind) values ('unheard_of') on conflict do nothing")
        site.queue.insert("unheard_of", {}, None, 3)
        after = daemon.get("/metrics")[1]
    return before, after


def value(text: str, series: str) -> float:
    """The value of one series; KeyError where there is none."""
    values = dict(re.findall(r"(?m)^(\S+) (\S+)$", text))
    return float(values[series])


@needs_promtool
def test_prometheus_finds_nothing_wrong_with_the_metrics(scrapes: tuple[str, str]) -> None:
    for text in scrapes:
        promtool("check", "metrics", given=text)


def test_every_count_is_there_before_it_counts(scrapes: tuple[str, str]) -> None:
    before, after = scrapes
    for series in (
        'maskd_tasks_failed_total{code="prompt_invalid"}',
        'maskd_tasks_failed_total{code="poison"}',
        'maskd_tasks_settled_total{fate="done",kind="segment_visual"}',
        'maskd_blob_requests_total{code="200",operation="GetObject"}',
        'maskd_stage_seconds_count{stage="write"}',
        'maskd_out_of_memory_total{pool="cpu"}',
        'maskd_database_failures_total{call="settle"}',
    ):
        assert value(before, series) == 0, series
    assert value(after, 'maskd_tasks_failed_total{code="prompt_invalid"}') == 1
    assert value(after, 'maskd_tasks_settled_total{fate="done",kind="segment_visual"}') == 1
    assert value(after, 'maskd_stage_seconds_count{stage="write"}') == 1
    assert value(after, 'maskd_database_seconds_count{call="settle"}') >= 1
    assert value(after, 'maskd_claims_total{result="found"}') >= 1
    assert value(after, "maskd_embedding_cache_misses_total") == 1


def test_the_queue_is_told_as_the_database_knows_it(scrapes: tuple[str, str]) -> None:
    before, after = scrapes
    assert value(before, 'maskd_queue_tasks{kind="segment_visual",status="pending"}') == 0
    assert value(after, 'maskd_queue_tasks{kind="unheard_of",status="pending"}') == 3
    assert value(after, 'maskd_queue_unserved_tasks{kind="unheard_of"}') == 3
    assert value(after, 'maskd_queue_unserved_tasks{kind="segment_visual"}') == 0
    assert value(after, 'maskd_queue_oldest_seconds{kind="unheard_of"}') >= 0
    assert value(after, "maskd_workers_live") == 1
    assert value(after, "maskd_ready") == 1
    assert value(after, 'maskd_push_live{source="notify"}') == 1


def test_alerts_and_dashboard_name_only_metrics_and_labels_that_there_are(scrapes: tuple[str, str]) -> None:
    there = read(scrapes[1]) | OF_PROMETHEUS
    there |= {"maskd_gpu_memory_bytes": set(metrics.GPU_MEMORY._labelnames)}  # this host may have no GPU
    there |= {"maskd_session_requests_total": set(metrics.SESSION_REQUESTS._labelnames)}  # nor a session
    there |= {"maskd_session_request_seconds_bucket": {"route", "le"}}
    wrong = []
    for expr in expressions():
        names, labels = used(expr)
        wrong += [f"there is no {name}: {expr}" for name in names - set(there)]
        known = set().union(*(there.get(name, set()) for name in names)) | ADDED_BY_PROMETHEUS
        wrong += [f"there is no label {label}: {expr}" for label in labels - known]
        assert names, expr
    assert wrong == []


def test_the_names_in_an_expression_are_found() -> None:
    expr = 'sum by (kind, le) (rate(a_bucket{x="b{c", y!~"d"}[5m])) / on (kind) group_left () (max(e_total) > 0)'
    assert used(expr) == ({"a_bucket", "e_total"}, {"x", "y", "kind", "le"})
    assert len(expressions()) > 60


@needs_promtool
def test_prometheus_reads_the_alerts_and_the_scrape() -> None:
    promtool("check", "rules", "alerts.yml")
    promtool("check", "config", "--syntax-only", "prometheus.yml")


@needs_promtool
def test_prometheus_reads_every_expression_of_the_dashboard(tmp_path: Path) -> None:
    rules = [{"record": f"maskd:{number}", "expr": expr} for number, expr in enumerate(expressions())]
    (tmp_path / "rules.yml").write_text(json.dumps({"groups": [{"name": "all", "rules": rules}]}))  # YAML reads JSON
    promtool("check", "rules", "rules.yml", cwd=tmp_path)


@needs_promtool
def test_alerts_fire_when_they_should_and_only_then() -> None:
    promtool("test", "rules", "alerts.test.yml")


def test_every_alert_is_seen_to_fire_and_to_keep_quiet_and_says_what_to_do() -> None:
    tests, rules = (MONITORING / "alerts.test.yml").read_text(), ALERTS.read_text()
    alerts = set(re.findall(r"- alert: (\w+)", rules))
    looks = re.findall(r"- alertname: (\w+)\n\s+eval_time: \w+\n(\s+exp_alerts:)?", tests)
    assert alerts == {name for name, fires in looks if fires} == {name for name, fires in looks if not fires}
    for word in ("severity:", "summary:", "description:"):
        assert rules.count(word) == len(alerts), word


def test_every_panel_has_a_title_a_unit_words_and_targets_of_the_chosen_source() -> None:
    assert DASHBOARD["uid"]
    assert {each["name"] for each in DASHBOARD["templating"]["list"]} == {"datasource", "instance"}
    for panel in PANELS:
        assert panel["title"], panel
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        references = [target["refId"] for target in panel["targets"]]
        assert references, panel["title"]
        assert len(references) == len(set(references)), panel["title"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"]), panel["title"]
    titles = [panel["title"] for panel in DASHBOARD["panels"]]
    assert len(set(titles)) == len(titles)
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(titles)


def test_no_panel_lies_over_another_or_beside_the_page() -> None:
    def cells(panel: dict[str, Any]) -> set[tuple[int, int]]:
        place = panel["gridPos"]
        return {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}

    panels = DASHBOARD["panels"]
    assert all(0 <= x < 24 for panel in panels for x, _ in cells(panel))
    assert [(one["title"], two["title"]) for one, two in combinations(panels, 2) if cells(one) & cells(two)] == []
