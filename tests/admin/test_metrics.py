"""The text for Prometheus says what the snapshots say, in both formats, whatever is in a name."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from rspd.admin.metrics import FAMILIES, Exposition
from rspd.snapshot import Backend, Listener, Pool, Process, Proxy, Snapshot
from tests.admin.samples import SAMPLE

parser = pytest.importorskip(
    "prometheus_client.parser", reason="prometheus_client is not here: apt install python3-prometheus-client"
)
openmetrics = pytest.importorskip("prometheus_client.openmetrics.parser")

OWN = Snapshot(Process("0.3.0", lineage="own", descriptors=10, descriptors_max=100), (Proxy("web", open=1, most=10),))
OPENMETRICS = "application/openmetrics-text"
TEXT = "text/plain; version=0.0.4; charset=utf-8"

# A line with a value, as the format has it: quotes, backslashes and line feeds in a label are escaped.
LINE = re.compile(r'(\w+)(?:\{((?:\w+="(?:[^"\\\n]|\\["\\n])*",?)+)\})? (\S+)')

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: bytes) -> Samples:
    """The values of a text, by name and labels."""
    found: Samples = {}
    for line in text.decode().removesuffix("\n").split("\n"):
        if line.startswith("# "):
            continue
        matched = LINE.fullmatch(line)
        assert matched, line
        name, labels, value = matched.groups()
        pairs = re.findall(r'(\w+)="((?:[^"\\]|\\.)*)"', labels or "")
        key = name, tuple((label, re.sub(r"\\(.)", unescaped, text)) for label, text in pairs)
        assert key not in found, f"twice: {line}"
        found[key] = float(value)
    return found


def unescaped(escape: re.Match[str]) -> str:
    return "\n" if escape[1] == "n" else escape[1]


def value(found: Samples, name: str, **labels: str) -> float:
    return found[name, tuple(sorted(labels.items()))]


def ask(exposition: Exposition, own: Snapshot = OWN) -> Samples:
    return samples(exposition.text(own, "")[1])


def ended(found: Samples) -> float:
    return value(found, "rspd_connections_total", proxy="web", backend="10.0.0.11:80", cause="client-closed")


def test_it_says_all_that_the_snapshot_says() -> None:
    content_type, text = Exposition().text(SAMPLE, "")
    assert content_type == TEXT
    found = samples(text)
    docs = {"proxy": "web", "pool": "docs"}
    for expected, name, labels in (
        (8, "rspd_open_connections", {"proxy": "web"}),
        (100, "rspd_max_connections", {"proxy": "web"}),
        (7, "rspd_backlog", {"proxy": "web"}),
        (60, "rspd_accepted_total", {"proxy": "web"}),
        (30, "rspd_connections_total", {"proxy": "web", "backend": "10.0.0.11:80", "cause": "client-closed"}),
        (10, "rspd_connections_total", {"proxy": "web", "backend": "-", "cause": "queue-timeout"}),
        (3000, "rspd_bytes_total", {"proxy": "web", "backend": "10.0.0.11:80", "direction": "upload"}),
        (123456789012, "rspd_bytes_total", {"proxy": "web", "backend": "10.0.0.11:80", "direction": "download"}),
        (5, "rspd_refused_total", {"proxy": "web", "reason": "deny"}),
        (12, "rspd_routed_total", {"proxy": "web", "route": "docs"}),
        (2, "rspd_queue_length", docs),
        (3, "rspd_queue_seconds_bucket", {"proxy": "web", "le": "60.0"}),
        (1, "rspd_backend_up", {**docs, "backend": "10.0.0.11:80"}),
        (0, "rspd_backend_up", {**docs, "backend": "10.0.0.12:80"}),
        (1, "rspd_backend_up_processes", {**docs, "backend": "10.0.0.11:80"}),
        (0, "rspd_backend_up_processes", {**docs, "backend": "10.0.0.12:80"}),
        (6, "rspd_backend_connections", {**docs, "backend": "10.0.0.11:80"}),
        (12, "rspd_backend_checks_total", {**docs, "backend": "10.0.0.12:80", "result": "bad"}),
        (3, "rspd_connect_failures_total", {**docs, "backend": "10.0.0.12:80"}),
        (30, "rspd_connect_seconds_bucket", {**docs, "backend": "10.0.0.11:80", "le": "0.001"}),
        (36, "rspd_connect_seconds_bucket", {**docs, "backend": "10.0.0.11:80", "le": "+Inf"}),
        (36, "rspd_connect_seconds_count", {**docs, "backend": "10.0.0.11:80"}),
        (1.5, "rspd_connect_seconds_sum", {**docs, "backend": "10.0.0.11:80"}),
        (90000.5, "rspd_connection_seconds_sum", {"proxy": "web"}),
        (4, "rspd_reloads_total", {"result": "ok"}),
        (1, "rspd_reloads_total", {"result": "failed"}),
        (1, "rspd_config_last_reload_successful", {}),
        (2, "rspd_handovers_total", {}),
        (40, "rspd_descriptors", {}),
        (1024, "rspd_descriptors_max", {}),
        (990, "rspd_loop_turn_seconds_bucket", {"le": "0.001"}),
        (1, "rspd_processes", {"state": "answering"}),
        (0, "rspd_processes", {"state": "silent"}),
        (1795999000, "rspd_start_time_seconds", {}),
        (1, "rspd_build_info", {"version": "0.3.0"}),
    ):
        assert value(found, name, **labels) == expected, name


def test_each_metric_is_there_with_its_type_and_words_and_no_other() -> None:
    _, text = Exposition().text(SAMPLE, "")
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text.decode(), re.MULTILINE))
    assert kinds == {family.name: family.kind.replace("info", "gauge") for family in FAMILIES}
    words = dict(re.findall(r"^# HELP (\S+) (.+)$", text.decode(), re.MULTILINE))
    assert words == {family.name: family.words for family in FAMILIES}
    parsed = list(parser.text_string_to_metric_families(text.decode()))
    assert len(parsed) == len(FAMILIES)


@pytest.mark.parametrize(
    "accept",
    [
        OPENMETRICS,
        # What Prometheus 2.42 asks for, and what Prometheus 3 asks for.
        f"{OPENMETRICS};version=1.0.0,{OPENMETRICS};version=0.0.1;q=0.75,text/plain;version=0.0.4;q=0.5,*/*;q=0.1",
        f"{OPENMETRICS};version=1.0.0;escaping=allow-utf-8;q=0.5,text/plain;version=1.0.0;escaping=allow-utf-8;q=0.3",
    ],
)
def test_it_speaks_openmetrics_to_who_asks_for_it(accept: str) -> None:
    exposition = Exposition()
    content_type, text = exposition.text(SAMPLE, accept)
    assert content_type.startswith(f"{OPENMETRICS}; version=")
    content, end = text[:-6], text[-6:]
    assert end == b"# EOF\n"
    assert samples(content) == ask(exposition, SAMPLE)
    assert b"# TYPE rspd_connections counter\n" in content
    assert len(list(openmetrics.text_string_to_metric_families(text.decode()))) == len(FAMILIES)


@pytest.mark.parametrize(
    "accept", ["", "*/*", "text/html", "text/plain;version=1.0.0", "application/json;;=,", "\xff\0"]
)
def test_it_speaks_prometheus_text_to_all_others(accept: str) -> None:
    assert Exposition().text(SAMPLE, accept)[0] == TEXT


def test_what_is_not_known_is_left_out() -> None:
    proxy = Proxy("web", retired=True, listeners=(Listener("@x", None),))
    found = ask(Exposition(), Snapshot(Process(), (proxy,), backends=(Backend("web", name="a:1"),)))
    names = {name for name, _ in found}
    assert "rspd_open_connections" in names
    assert not {name for name in names if "seconds_" in name or "checks" in name}
    assert not names & {"rspd_backlog", "rspd_max_connections"}


def test_a_file_that_is_not_in_force_is_seen() -> None:
    own = OWN._replace(process=OWN.process._replace(failure="/etc/rspd.yaml:3: unknown key"))
    assert value(ask(Exposition(), own), "rspd_config_last_reload_successful") == 0


EXPOSITION = Exposition()


@given(st.text(st.characters() | st.sampled_from('"\\\n\r\0{},= #\udcff\u2028'), max_size=20))
@example('"} 1\nrspd_evil{a="')
@example("/run/\udcff.sock")
@example("\\n")
@settings(max_examples=60)
def test_a_name_may_be_anything(name: str) -> None:
    own = Snapshot(Process(name), (Proxy(name, open=7),), (), (Pool(name, name),), (Backend(name, name, name=name),))
    said = name.encode(errors="backslashreplace").decode()
    found = ask(EXPOSITION, own)
    assert value(found, "rspd_open_connections", proxy=said) == 7
    assert value(found, "rspd_backend_up", proxy=said, pool=said, backend=said) == 1
    assert value(found, "rspd_build_info", version=said) == 1
    assert {name for name, _ in found} == {name for name, _ in ask(EXPOSITION, own._replace(process=Process()))}


def test_what_has_the_same_labels_is_one() -> None:
    backends = (Backend("", "x", True, "a:1", open=2), Backend("", "x", False, "a:1", "down", open=3))
    proxies = (Proxy("web", open=1, accepted=4), Proxy("web", retired=True, open=5, accepted=6))
    found = ask(Exposition(), Snapshot(proxies=proxies, backends=backends))
    assert value(found, "rspd_open_connections", proxy="web") == 6
    assert value(found, "rspd_accepted_total", proxy="web") == 10
    assert value(found, "rspd_backend_connections", proxy="", pool="x", backend="a:1") == 5
    assert value(found, "rspd_backend_up", proxy="", pool="x", backend="a:1") == 0
    up = (Backend("", "x", True, "a:1"), Backend("", "x", False, "a:1"))
    assert value(ask(Exposition(), Snapshot(backends=up)), "rspd_backend_up", proxy="", pool="x", backend="a:1") == 1


def test_what_a_process_of_another_version_has_handed_over_is_left_out_where_it_does_not_fit() -> None:
    exposition = Exposition()
    handed = {
        "rspd_accepted_total": [[["web", "more"], [1]], [["ssh"], [1, 2]], [["mail"], [7]]],
        "rspd_x": [[[], [1]]],
    }
    exposition.resume({"ended": handed, "workers": {}})
    found = ask(exposition)
    assert [labels for name, labels in found if name == "rspd_accepted_total"] == [
        (("proxy", "web"),),
        (("proxy", "mail"),),
    ]
    assert "rspd_x" not in {name for name, _ in found}


def test_prometheus_client_is_imported_only_by_who_wants_metrics_and_its_lack_is_said() -> None:
    code = """
import sys
sys.modules["prometheus_client"] = None
from rspd.admin.metrics import Exposition
try:
    Exposition()
except ImportError as error:
    print(error.name)
"""
    end = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert end.stdout.strip().startswith("prometheus_client")
