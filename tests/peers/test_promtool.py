"""Debian's promtool finds the metrics and the alerts right; each alert is raised when it should be."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from tests.admin.samples import SAMPLE
from tests.peers.test_prometheus import RULES, program
from tests.support import PATIENCE

pytest.importorskip("prometheus_client", reason="prometheus_client is not here: apt install python3-prometheus-client")
from rspd.admin.metrics import Exposition


def promtool(*arguments: str, text: bytes = b"") -> str:
    """What promtool says; it has to succeed."""
    done = subprocess.run([program("promtool"), *arguments], input=text, capture_output=True, timeout=PATIENCE)
    said = (done.stdout + done.stderr).decode()
    assert done.returncode == 0, said
    return said


def test_promtool_has_nothing_to_say_of_the_metrics() -> None:
    assert promtool("check", "metrics", text=Exposition().text(SAMPLE, "")[1]) == ""


def test_promtool_finds_the_rules_right() -> None:
    assert "SUCCESS" in promtool("check", "rules", "--lint-fatal", str(RULES))


# What happens to rspd at a:9114: series as `promtool test rules` has them, a value each minute.
RSPD = 'instance="a:9114",job="rspd"'
WEB = f'{RSPD},proxy="web"'
POOL = f'{WEB},pool="docs"'


class Case(NamedTuple):
    """When there is no alert yet, when there is one, and its labels and its summary then. There is no other alert."""

    series: dict[str, str]
    quiet: str
    raised: str
    labels: str
    summary: str


CASES = {
    "RspdDown": Case({f"up{{{RSPD}}}": "1 1 0x9"}, "2m", "4m", RSPD, "No metrics from rspd at a:9114"),
    "RspdAbsent": Case({'up{job="other"}': "1x10"}, "4m", "6m", 'job="rspd"', "Prometheus asks no rspd"),
    "RspdBackendDown": Case(
        {f'rspd_backend_up{{{POOL},backend="b:1"}}': "1 0x9", f'rspd_backend_up{{{POOL},backend="b:2"}}': "1x10"},
        "2m",
        "4m",
        f'{POOL},backend="b:1"',
        "Backend b:1 is out of service, proxy web, pool docs, on a:9114",
    ),
    "RspdNoBackend": Case(
        {f'rspd_backend_up{{{RSPD},proxy="",pool="",backend="b:1"}}': "1 0x9"},
        "1m",
        "2m",
        RSPD,
        "No backend in service, on a:9114",
    ),
    "RspdClientsWait": Case(
        {
            # One of two workers has all places taken.
            f"rspd_backlog{{{WEB}}}": "0 3x9",
            f"rspd_open_connections{{{WEB}}}": "1x10",
            f"rspd_max_connections{{{WEB}}}": "2x10",
        },
        "1m",
        "3m",
        WEB,
        "3 clients wait, proxy web, on a:9114",
    ),
    "RspdFailures": Case(
        {
            f'rspd_connections_total{{{WEB},backend="b:1",cause="client-closed"}}': "0+80x20",
            f'rspd_connections_total{{{WEB},backend="b:2",cause="backend-refused"}}': "0+20x20",
        },
        "4m",
        "12m",
        WEB,
        "20% of connections fail, proxy web, on a:9114",
    ),
    "RspdRefused": Case(
        {f'rspd_refused_total{{{WEB},reason="deny"}}': "0+120x30"},
        "9m",
        "20m",
        f'{WEB},reason="deny"',
        "2 clients a second are refused by deny, proxy web, on a:9114",
    ),
    "RspdReloadFailed": Case(
        {f"rspd_config_last_reload_successful{{{RSPD}}}": "1 0x9"},
        "1m",
        "3m",
        RSPD,
        "/etc/rspd.yaml is not in force on a:9114",
    ),
    "RspdDescriptors": Case(
        {f"rspd_descriptors{{{RSPD}}}": "95x20", f"rspd_descriptors_max{{{RSPD}}}": "100x20"},
        "4m",
        "6m",
        RSPD,
        "rspd on a:9114 has 95% of its file descriptors in use",
    ),
    "RspdSlow": Case(
        {
            f'rspd_loop_turn_seconds_bucket{{{RSPD},le="0.1"}}': "0+90x30",
            f'rspd_loop_turn_seconds_bucket{{{RSPD},le="0.5"}}': "0+100x30",
            f'rspd_loop_turn_seconds_bucket{{{RSPD},le="+Inf"}}': "0+100x30",
        },
        "9m",
        "20m",
        RSPD,
        "rspd on a:9114 is slow: turns of 460ms",
    ),
    "RspdBeganAnew": Case(
        {f"rspd_start_time_seconds{{{RSPD}}}": "1000x20 3000x20"},
        "20m",
        "22m",
        RSPD,
        "rspd on a:9114 began anew and cut its connections",
    ),
}


@pytest.mark.parametrize("alert", CASES)
def test_an_alert_is_raised_when_it_should_be_and_not_before(alert: str, tmp_path: Path) -> None:
    case = CASES[alert]
    series = case.series if alert == "RspdAbsent" else {'up{job="rspd",instance="b:9114"}': "1x60", **case.series}
    (rule,) = (one for one in yaml.safe_load(RULES.read_text())["groups"][0]["rules"] if one["alert"] == alert)
    description = rule["annotations"]["description"].replace("{{ $labels.reason }}", "deny")
    said = {
        "exp_labels": {**dict(re.findall('(\\w+)="(.*?)"', case.labels)), **rule["labels"]},
        "exp_annotations": {"summary": case.summary, "description": description},
    }
    test = {
        "interval": "1m",
        "input_series": [{"series": name, "values": values} for name, values in series.items()],
        "alert_rule_test": [
            {"eval_time": case.quiet, "alertname": alert, "exp_alerts": []},
            {"eval_time": case.raised, "alertname": alert, "exp_alerts": [said]},
        ],
        "promql_expr_test": [
            {
                "eval_time": case.raised,
                "expr": 'count(ALERTS{alertstate="firing"})',
                "exp_samples": [{"labels": "{}", "value": 1}],
            }
        ],
    }
    file = tmp_path / "test.yml"
    file.write_text(yaml.safe_dump({"rule_files": [str(RULES)], "evaluation_interval": "30s", "tests": [test]}))
    promtool("test", "rules", str(file))
