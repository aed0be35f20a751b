"""Debian's Prometheus takes what rspd serves, and understands the alerts and the dashboard."""

from __future__ import annotations

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

import pytest
import yaml

from rspd.snapshot import Backend, Pool, Process, Proxy, Snapshot
from tests.daemon.control import status
from tests.fleet import File, talks
from tests.peers.programs import listening
from tests.support import PATIENCE, echo, eventually, free_port
from tests.support import Backend as Server
from tests.test_documentation import ROOT
from tests.test_metrics_page import PANELS

pytest.importorskip("prometheus_client", reason="prometheus_client is not here: apt install python3-prometheus-client")
from rspd.admin.metrics import FAMILIES, Exposition

RULES = ROOT / "docs/rspd-alerts.yml"

# What may be in the name of a proxy, a pool or a backend: everything that Unicode has.
ODD = '"}\\ \n\r\t\0\x7f\x1b[1m,{= # é\u2028\U0001f600'

Text = Callable[[str], tuple[str, bytes]]


def program(name: str) -> str:
    """The path of a program; skips the test if there is none."""
    path = shutil.which(name)
    if not path:
        pytest.skip(f"{name} is not here: apt install prometheus")
    return path


@contextmanager
def serving(text: Text) -> Iterator[str]:
    """An HTTP server that answers with what `text` makes for a header Accept; yields its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer."""
            content_type, content = text(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join(PATIENCE)


class Target(NamedTuple):
    """rspd.service. metrics: the address where it serves them. web: the port of this proxy. up, down: its backends."""

    metrics: str
    up: str
    down: str
    web: int

    def visit(self) -> None:
        """Have a connection begin and end."""
        with come(self.web) as client:
            assert talks(client)


def come(port: int, source: str = "127.0.0.1") -> socket.socket:
    """A client from this address."""
    return socket.create_connection(("127.0.0.1", port), PATIENCE, (source, 0))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """rspd.service and a worker. One of two backends of web does not run.

    In rspd.service each proxy has a client, as web has in the worker. Another one waits for ssh, and one for a backend
    of full. One was refused.
    """
    folder = tmp_path_factory.mktemp("rspd")
    with ExitStack() as stack:
        # Nobody listens there, and nobody else gets the port: `free_port` keeps one for a test only.
        held = stack.enter_context(socket.socket())
        held.bind(("127.0.0.1", 0))
        metrics, down = f"127.0.0.1:{free_port()}", f"127.0.0.1:{held.getsockname()[1]}"
        up = stack.enter_context(Server(echo)).address
        proxies: dict[str, dict[str, Any]] = {
            "web": {"routes": [{"pool": "docs"}], "deny": "127.0.0.2"},
            "ssh": {"backend": up, "max_connections": 1},
            "full": {"backends": [{"address": up, "max_connections": 1}], "connect_timeout": "10m"},
        }
        pools = {"docs": {"backends": [up, down], "health": {"interval": "100ms", "fall": 1}}}

        def start(**env: str) -> dict[str, int]:
            """Start a process; the ports of its proxies."""
            ports = {name: free_port() for name in proxies}
            each = {name: {**proxy, "listen": f"127.0.0.1:{ports[name]}"} for name, proxy in proxies.items()}
            file = File(folder, listen=None, proxies=each, pools=pools, max_connections=10, metrics=metrics)
            daemon = stack.enter_context(file.rspd(env={"RUNTIME_DIRECTORY": str(folder), **env}))
            daemon.wait_for("listening address=", len(ports))
            return ports

        def found_down(name: str) -> bool:
            return [one.name for one in status(folder / name).backends if not one.in_service] == [down]

        service, worker = start(), start(RSPD_WORKER="1")
        for port in (worker["web"], *service.values()):
            assert talks(stack.enter_context(come(port)))
        with suppress(ConnectionResetError), come(service["web"], "127.0.0.2") as refused:
            refused.recv(1)  # it may be reset before it knows that it is connected
        for name in ("ssh", "full"):
            stack.enter_context(come(service[name])).sendall(b"x")
        target = Target(metrics, up, down, service["web"])
        target.visit()
        eventually(lambda: found_down("control.sock") and found_down("worker-1.sock"), "checks have failed")
        yield target


@pytest.fixture(scope="module")
def odd_targets() -> Iterator[dict[str, str]]:
    """Two with odd names, by their jobs: one speaks OpenMetrics to Prometheus, one the older format."""
    exposition = Exposition()
    odd = Snapshot(Process(ODD), (Proxy(ODD, open=7),), (), (Pool(ODD, ODD),), (Backend(ODD, ODD, name=ODD),))
    with (
        serving(lambda accept: exposition.text(odd, accept)) as openmetrics,
        serving(lambda accept: exposition.text(odd, "")) as older,
    ):
        yield {"openmetrics": openmetrics, "older": older}


class Prometheus:
    """A Prometheus, asked by its HTTP API."""

    def __init__(self, port: int) -> None:
        self.port = port

    def get(self, path: str) -> tuple[int, bytes]:
        """The status and the content of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def ready(self) -> bool:
        """Whether it is at work."""
        return listening(self.port) and self.get("/-/ready")[0] == 200

    def ask(self, path: str, **parameters: str) -> Any:
        """The data of its answer; it has to be one."""
        status, content = self.get(f"/api/v1/{path}?{urlencode(parameters)}")
        assert status == 200, content
        return json.loads(content)["data"]

    def query(self, expression: str) -> list[dict[str, Any]]:
        """The result of an expression."""
        result: list[dict[str, Any]] = self.ask("query", query=expression)["result"]
        return result

    def targets(self) -> dict[str, dict[str, Any]]:
        """Its targets, by their jobs."""
        return {one["labels"]["job"]: one for one in self.ask("targets", state="active")["activeTargets"]}


@pytest.fixture(scope="module")
def prometheus(
    target: Target, odd_targets: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """A Prometheus that has asked each target several times, and has the rules."""
    path = program("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    jobs = [
        {"job_name": name, "static_configs": [{"targets": [address]}]}
        for name, address in {"rspd": target.metrics, **odd_targets}.items()
    ]
    config = {
        "global": {"scrape_interval": "500ms", "scrape_timeout": "500ms", "evaluation_interval": "500ms"},
        "rule_files": [str(RULES)],
        "scrape_configs": jobs,
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as held, open(folder / "output", "w") as output:
        # Nobody else gets the port while it is bound here, and Prometheus may bind it too (SO_REUSEADDR, socket(7)).
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        command = [
            path,
            f"--config.file={folder}/prometheus.yml",
            f"--storage.tsdb.path={folder}/data",
            f"--web.listen-address=127.0.0.1:{port}",
        ]
        process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        try:
            asked = Prometheus(port)
            eventually(lambda: process.poll() is not None or asked.ready(), "Prometheus is ready")
            assert process.poll() is None, Path(output.name).read_text()
            enough = "min(sum_over_time(up[1m])) >= 4"
            eventually(lambda: len(asked.targets()) == len(jobs) and asked.query(enough), "Prometheus has asked")
            yield asked
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(PATIENCE)


def test_prometheus_has_no_complaint_of_what_it_gets(prometheus: Prometheus) -> None:
    # One answer may be too late on a busy machine.
    told = {job: (one["health"], one["lastError"]) for job, one in prometheus.targets().items()}
    complaints = {job: said for job, said in told.items() if "deadline exceeded" not in said[1] and said != ("up", "")}
    assert complaints == {}
    assert eventually(lambda: prometheus.query("count(up == 1) == 3"), "all are up")


def test_prometheus_gets_each_metric_with_its_type_and_words(prometheus: Prometheus) -> None:
    metadata = prometheus.ask("targets/metadata", match_target='{job="rspd"}')
    told = {one["metric"]: (one["type"], one["help"]) for one in metadata if one["metric"].startswith("rspd_")}
    assert told == {
        # OpenMetrics has names of counters and of information without their ends.
        (family.name.removesuffix("_total").removesuffix("_info")): (family.kind, family.words)
        for family in FAMILIES
    }


def test_prometheus_knows_what_rspd_has_said(prometheus: Prometheus, target: Target) -> None:
    expected = {
        'rspd_open_connections{proxy="web"}': 2,
        'rspd_max_connections{proxy="ssh"}': 2,
        'rspd_backlog{proxy="ssh"}': 1,
        'rspd_queue_length{proxy="full"}': 1,
        'rspd_refused_total{proxy="web",reason="deny"}': 1,
        f'rspd_backend_up{{backend="{target.down}"}}': 0,
        f'rspd_backend_up_processes{{pool="docs",backend="{target.up}"}}': 2,
        f'rspd_bytes_total{{proxy="ssh",backend="{target.up}",direction="download"}}': 5,
        'rspd_connect_seconds_count{proxy="ssh"}': 1,
        'rspd_processes{job="rspd",state="answering"}': 2,
        'time() - rspd_start_time_seconds{job="rspd"} < bool 600': 1,
    }
    wanted = {expression: [value] for expression, value in expected.items()}

    found: dict[str, list[float]] = {}

    def as_wanted() -> bool:
        found.update({name: [float(one["value"][1]) for one in prometheus.query(name)] for name in expected})
        return found == wanted

    with suppress(AssertionError):  # what was said is gone for a while if one answer is too late
        eventually(as_wanted)
    assert found == wanted


def test_a_counter_that_goes_up_has_a_rate(prometheus: Prometheus, target: Target) -> None:
    ended = f'rspd_connections_total{{proxy="web",cause="client-closed",backend="{target.up}"}}'
    target.visit()
    eventually(lambda: prometheus.query(f"rate({ended}[1m]) > 0"), "a rate")
    assert prometheus.query(f"resets({ended}[1m])")[0]["value"][1] == "0"


def test_odd_names_arrive_as_they_are(prometheus: Prometheus) -> None:
    for job in ("openmetrics", "older"):
        (one,) = eventually(lambda: prometheus.query(f'rspd_backend_up{{job="{job}"}}'))  # noqa: B023
        assert {one["metric"][label] for label in ("proxy", "pool", "backend")} == {ODD}


def test_prometheus_has_loaded_the_alerts_and_a_backend_that_is_down_raises_its_own(prometheus: Prometheus) -> None:
    def rules() -> list[dict[str, Any]]:
        (group,) = prometheus.ask("rules")["groups"]
        found: list[dict[str, Any]] = group["rules"]
        return found

    eventually(lambda: all(rule["health"] != "unknown" for rule in rules()), "the rules are evaluated")
    assert [rule["lastError"] for rule in rules() if rule["health"] != "ok"] == []
    raised = ["RspdBackendDown", "RspdClientsWait", "RspdClientsQueued"]
    eventually(lambda: [rule["name"] for rule in rules() if rule["state"] != "inactive"] == raised, "the right alerts")


def test_each_panel_of_the_dashboard_gets_data(prometheus: Prometheus) -> None:
    chosen = {"$__rate_interval": "1m", "$instance": ".*", "$proxy": ".*"}
    for panel in PANELS:
        for asked in panel["targets"]:
            expression = re.sub(r"\$\w+", lambda name: chosen[name[0]], asked["expr"])
            assert eventually(lambda: prometheus.query(expression), f"{panel['title']}: {expression}")  # noqa: B023
