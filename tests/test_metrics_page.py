"""docs/metrics.md, the alert rules and the dashboard name the metrics that there are, and all of them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, get_args

import pytest
import yaml

from rspd.admin.metrics import FAMILIES, Exposition, Family
from rspd.engine.cause import Cause
from tests.admin.samples import SAMPLE
from tests.test_documentation import ROOT

PAGE = (ROOT / "docs/metrics.md").read_text()
DASHBOARD = json.loads((ROOT / "docs/rspd-dashboard.json").read_text())
RULES = [
    rule for group in yaml.safe_load((ROOT / "docs/rspd-alerts.yml").read_text())["groups"] for rule in group["rules"]
]
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

# Labels that Prometheus adds.
OF_TARGETS = {"instance", "job"}


def queries() -> Iterator[tuple[str, str]]:
    """All expressions in the three files, with where they stand."""
    for rule in RULES:
        yield rule["alert"], rule["expr"]
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for variable in DASHBOARD["templating"]["list"][1:]:
        yield variable["name"], re.sub(r"^label_values\((.*), \w+\)$", r"\1", variable["definition"])
    for line in re.findall(r"^```\n((?:sum|rspd_).*?)^```", PAGE, re.MULTILINE | re.DOTALL)[0].splitlines():
        yield "page", line


def families_of(expression: str) -> Iterator[tuple[Family, str]]:
    """The metrics of an expression, with what stands in braces behind them."""
    known = {family.name: family for family in FAMILIES}
    for name, braces in re.findall(r"\b(rspd_\w+)(?:\{(.*?)\})?", expression):
        base = name if name in known else re.sub("_(bucket|sum|count)$", "", name)
        assert base in known, f"{name} is no metric"
        assert (base != name) == (known[base].kind == "histogram"), name
        yield known[base], braces


@pytest.mark.parametrize(("where", "expression"), list(queries()))
def test_a_query_names_metrics_and_labels_that_there_are(where: str, expression: str) -> None:
    labels = set(OF_TARGETS)
    for family, braces in families_of(expression):
        labels |= {*family.labels, *(["le"] if family.bounds else [])}
        assert set(re.findall(r"(\w+)=", braces)) <= {*family.labels, *OF_TARGETS}, where
        if family.kind in ("counter", "histogram"):
            assert re.search(rf"(rate|increase)\({family.name}\w*(\{{[^}}]*\}})?\[", expression), where
    for listed in re.findall(r"(?:by|without) \((.*?)\)", expression):
        assert set(listed.split(", ")) <= labels, where


def test_the_dashboard_shows_each_metric() -> None:
    shown = {family for panel in PANELS for target in panel["targets"] for family, _ in families_of(target["expr"])}
    assert shown == set(FAMILIES)


def test_the_page_has_a_table_of_all_metrics() -> None:
    rows = re.findall(r"^\| `(rspd_\w+)` \| (\w+) \| (.*?) ?\| (.*) \|$", PAGE, re.MULTILINE)
    assert rows == [
        (
            family.name,
            family.kind.replace("info", "gauge"),
            ", ".join(f"`{label}`" for label in family.labels),
            family.words,
        )
        for family in FAMILIES
    ]


def test_what_the_page_shows_is_what_rspd_serves() -> None:
    pytest.importorskip(
        "prometheus_client", reason="prometheus_client is not here: apt install python3-prometheus-client"
    )
    (shown,) = re.findall(r"^\$ curl .* \| grep rspd_open_connections\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    served = Exposition().text(SAMPLE, "")[1].decode()
    assert shown == "".join(re.findall(".*rspd_open_connections.*\n", served))


def test_the_page_has_a_table_of_all_alerts() -> None:
    assert re.findall(r"^\| `(Rspd\w+)` \|", PAGE, re.MULTILINE) == [rule["alert"] for rule in RULES]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_an_alert_says_what_is_and_what_to_do(rule: dict[str, Any]) -> None:
    assert rule["labels"]["severity"] in ("critical", "warning", "info")
    summary, description = rule["annotations"]["summary"], rule["annotations"]["description"]
    assert "$labels.instance" in summary or rule["alert"] == "RspdAbsent"
    assert re.search("`.*`|Look for", description)


def test_the_alert_on_failures_counts_the_causes_that_are_nobodys_wish() -> None:
    (pattern,) = (re.findall(r'cause=~"(.*?)"', rule["expr"])[0] for rule in RULES if rule["alert"] == "RspdFailures")
    assert {cause for cause in get_args(Cause) if re.fullmatch(pattern, cause)} == {
        "backend-aborted",
        "backend-down",
        "backend-refused",
        "backend-unknown",
        "backend-unreachable",
        "connect-timeout",
        "error",
        "handover-failed",
        "loop",
        "queue-timeout",
    }


def test_the_dashboard_asks_the_data_source_that_is_chosen_and_its_panels_lie_side_by_side() -> None:
    chosen = {"type": "prometheus", "uid": "${datasource}"}
    names = [variable["name"] for variable in DASHBOARD["templating"]["list"]]
    assert names == ["datasource", "instance", "proxy"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert not cells & taken, panel["title"]
        assert max(x for x, _ in cells) < 24
        taken |= cells
    for panel in PANELS:
        assert panel["datasource"] == chosen
        assert [target["datasource"] for target in panel["targets"]] == [chosen] * len(panel["targets"])
        assert [target["refId"] for target in panel["targets"]] == list("ABCD")[: len(panel["targets"])]
        assert panel["description"]
