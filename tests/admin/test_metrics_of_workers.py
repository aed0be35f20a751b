"""The metrics of a service with workers are sums; what a worker has counted is not lost with it."""

from __future__ import annotations

import json
import os
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from rspd.admin import metrics
from rspd.admin.metrics import Exposition
from rspd.snapshot import Snapshot
from tests.admin.samples import SAMPLE, Worker, grown, of_lineage, worker
from tests.admin.test_metrics import ask, ended, value
from tests.support import OUR_USER, PATIENCE, eventually


@pytest.fixture(autouse=True)
def nobody_is_late_on_a_busy_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PATIENCE", PATIENCE / 2)
    monkeypatch.setattr(metrics, "PATIENCE_FOR_ALL", PATIENCE)


def test_workers_are_summed_and_one_that_is_frozen_keeps_its_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PATIENCE", 2.0)
    with (
        worker(tmp_path / "worker-1.sock", of_lineage(SAMPLE, "w1")) as one,
        worker(tmp_path / "worker-2.sock", of_lineage(SAMPLE, "w2")) as two,
    ):
        exposition = Exposition(lambda: [one.path, two.path])
        found = ask(exposition)
        assert ended(found) == 60
        assert value(found, "rspd_open_connections", proxy="web") == 1 + 8 + 8
        assert value(found, "rspd_processes", state="answering") == 3
        assert value(found, "rspd_descriptors") == 10  # of 100, which is nearest to the limit
        one.at_work.clear()
        two.snapshot = grown(two.snapshot, 4)
        found = ask(exposition)
        assert ended(found) == 64
        assert value(found, "rspd_open_connections", proxy="web") == 1 + 8
        assert value(found, "rspd_processes", state="silent") == 1
        one.at_work.set()
        assert value(ask(exposition), "rspd_open_connections", proxy="web") == 1 + 8 + 8


def test_a_worker_that_began_anew_and_one_that_is_gone_keep_their_counters(tmp_path: Path) -> None:
    paths = [str(tmp_path / "worker-1.sock"), str(tmp_path / "worker-2.sock")]
    exposition = Exposition(lambda: paths)
    with worker(tmp_path / "worker-1.sock", of_lineage(SAMPLE, "w1")) as one:
        with worker(tmp_path / "worker-2.sock", of_lineage(SAMPLE, "w2")):
            assert ended(ask(exposition)) == 60
        one.snapshot = of_lineage(grown(SAMPLE, 1), "w1b")
        found = ask(exposition)
        assert ended(found) == 30 + 30 + 31
        assert value(found, "rspd_processes", state="silent") == 1
        paths.pop()
        found = ask(exposition)
        assert ended(found) == 30 + 30 + 31
        assert value(found, "rspd_processes", state="silent") == 0
        following = Exposition(lambda: paths)
        following.resume(json.loads(json.dumps(exposition.hand_over())))
        assert ended(ask(following)) == 30 + 30 + 31


def test_a_worker_that_a_reload_moves_counts_once_also_in_the_next_process(tmp_path: Path) -> None:
    paths = [str(tmp_path / "one-worker-1.sock")]
    exposition = Exposition(lambda: paths)
    with worker(tmp_path / "one-worker-1.sock", of_lineage(SAMPLE, "w1")):
        assert ended(ask(exposition)) == 30
    paths[:] = []
    assert ended(ask(exposition)) == 30
    paths[:] = [str(tmp_path / "two-worker-1.sock")]
    with worker(tmp_path / "two-worker-1.sock", of_lineage(grown(SAMPLE, 1), "w1")):
        assert ended(ask(exposition)) == 31
        following = Exposition(lambda: paths)
        following.resume(json.loads(json.dumps(exposition.hand_over())))
        assert ended(ask(following)) == 31


def without(snapshot: Snapshot, *names: str) -> Snapshot:
    """The same where backends with these names are out of service, and the others in service."""
    backends = (
        one._replace(state="down" if one.name in names else "up", in_service_in=int(one.name not in names))
        for one in snapshot.backends
    )
    return snapshot._replace(backends=tuple(backends))


def test_a_backend_is_up_if_it_is_in_one_worker_at_least(tmp_path: Path) -> None:
    names = "10.0.0.11:80", "10.0.0.12:80", "10.0.0.5:22"
    first, second = ({"proxy": "web", "pool": "docs", "backend": name} for name in names[:2])
    third = {"proxy": "ssh", "pool": "", "backend": names[2]}
    with (
        worker(tmp_path / "worker-1.sock", without(of_lineage(SAMPLE, "w1"), names[0])) as one,
        worker(tmp_path / "worker-2.sock", without(of_lineage(SAMPLE, "w2"), names[1])) as two,
    ):
        exposition = Exposition(lambda: [one.path, two.path])
        for labels, number in ((first, 1), (second, 1), (third, 2)):
            found = ask(exposition)
            assert value(found, "rspd_backend_up", **labels) == 1
            assert value(found, "rspd_backend_up_processes", **labels) == number
        two.snapshot = without(two.snapshot, names[0])
        found = ask(exposition)
        assert value(found, "rspd_backend_up", **first) == 0
        assert value(found, "rspd_backend_up_processes", **first) == 0
        assert value(found, "rspd_backend_up", **second) == 1


def test_a_backend_that_one_worker_has_no_more_and_reloads_count_right(tmp_path: Path) -> None:
    labels = {"proxy": "web", "pool": "docs", "backend": "10.0.0.11:80"}
    with (
        worker(tmp_path / "worker-1.sock", of_lineage(SAMPLE, "w1")) as one,
        worker(tmp_path / "worker-2.sock", of_lineage(SAMPLE, "w2")) as two,
    ):
        exposition = Exposition(lambda: [one.path, two.path])
        assert value(ask(exposition), "rspd_connect_seconds_count", **labels) == 72
        one.snapshot = one.snapshot._replace(backends=())
        found = ask(exposition)
        assert value(found, "rspd_connect_seconds_count", **labels) == 72
        assert value(found, "rspd_reloads_total", result="ok") == 4
        two.snapshot = two.snapshot._replace(backends=())
        assert "rspd_connect_seconds_count" not in {name for name, _ in ask(exposition)}


def test_frozen_workers_keep_the_text_waiting_for_a_while_only_and_each_worker_gets_its_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PATIENCE", 0.3)
    monkeypatch.setattr(metrics, "PATIENCE_FOR_ALL", 0.4)
    with ExitStack() as stack:
        workers = [
            stack.enter_context(worker(tmp_path / f"worker-{number}.sock", of_lineage(SAMPLE, str(number))))
            for number in range(3)
        ]
        for each in workers[:2]:
            each.at_work.clear()
        exposition = Exposition(lambda: [each.path for each in workers])
        begin = time.monotonic()
        assert value(ask(exposition), "rspd_processes", state="silent") >= 2
        assert time.monotonic() - begin < 5  # a busy machine; it is 0.3
        eventually(lambda: value(ask(exposition), "rspd_processes", state="silent") == 2, "the one at work is asked")
        for each in workers[:2]:
            each.at_work.set()
        eventually(lambda: value(ask(exposition), "rspd_processes", state="silent") == 0, "all are asked")


def test_a_worker_whose_answer_comes_in_drops_takes_no_time_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PATIENCE", 1.0)
    monkeypatch.setattr(metrics, "PATIENCE_FOR_ALL", 1.0)
    with dripping(tmp_path / "worker-1.sock"), worker(tmp_path / "worker-2.sock", of_lineage(SAMPLE, "w2")) as well:
        exposition = Exposition(lambda: [str(tmp_path / "worker-1.sock"), well.path])

        ask(exposition)  # which may have read the drops only
        assert [value(ask(exposition), "rspd_processes", state="silent") for _ in range(2)] == [1] * 2


class Dripping(socketserver.ThreadingUnixStreamServer):
    """A process that answers a byte at a time, for ever."""

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), _Drip)
        self.over = threading.Event()


class _Drip(socketserver.BaseRequestHandler):
    server: Dripping

    def handle(self) -> None:
        with suppress(OSError):
            self.request.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            while not self.server.over.wait(0.02):
                self.request.sendall(b" ")


@contextmanager
def dripping(path: Path) -> Iterator[None]:
    """Such a process, until the end."""
    with Dripping(path) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield
        finally:
            server.over.set()
            server.shutdown()
            thread.join(PATIENCE)


def test_workers_that_accept_nobody_use_up_the_same_time_and_take_none_from_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics, "PATIENCE", 0.2)
    with ExitStack() as stack:
        paths = []
        for number in range(8):
            frozen = stack.enter_context(socket.socket(socket.AF_UNIX))
            frozen.bind(str(tmp_path / f"worker-{number}.sock"))
            frozen.listen(number % 2)  # of some, the backlog is soon full
            paths.append(frozen.getsockname())
        paths.append(stack.enter_context(worker(tmp_path / "worker-9.sock", of_lineage(SAMPLE, "w9"))).path)
        exposition = Exposition(lambda: paths)

        def the_others_answer() -> bool:
            begin = time.monotonic()
            found = ask(exposition)
            assert time.monotonic() - begin < 5  # a busy machine; it is 0.2, and 0.4 once a backlog is full
            silent = value(found, "rspd_processes", state="silent")
            assert silent >= 8
            return silent == 8 and value(found, "rspd_open_connections", proxy="web") == 1 + 8

        for _ in range(4):
            eventually(the_others_answer)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\0" * 100,
        b"HTTP/1.1 200 OK\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{",
        b"HTTP/1.1 503 Busy\r\n\r\nbusy",
        b"HTTP/1.1 200 OK\r\n\r\n" + b"[" * 100_000,
        b'HTTP/1.1 200 OK\r\n\r\n{"proxies": 1}',
        b'HTTP/1.1 200 OK\r\n\r\n{"process": {"age": 1' + b"0" * 400 + b"}}",
        b'HTTP/1.1 200 OK\r\n\r\n{"proxies": [{"ends": [{"number": true}]}]}',
    ],
)
def test_a_worker_whose_answer_is_none_is_silent(answer: bytes, broken: Worker) -> None:
    broken.answer = answer
    found = ask(Exposition(lambda: [broken.path]))
    assert value(found, "rspd_processes", state="silent") == 1
    assert value(found, "rspd_open_connections", proxy="web") == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_another_user_that_listens_where_a_worker_should_be_is_not_asked(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(tmp_path / "worker-1.sock"))
        os.seteuid(OUR_USER)
        try:
            other.listen()
        finally:
            os.seteuid(0)
        assert value(ask(Exposition(lambda: [other.getsockname()])), "rspd_processes", state="silent") == 1
        other.settimeout(PATIENCE)
        client, _ = other.accept()
        with client:
            assert client.recv(1) == b""


@pytest.fixture
def broken(tmp_path: Path) -> Iterator[Worker]:
    with worker(tmp_path / "worker-1.sock", SAMPLE) as one:
        yield one


def test_other_threads_wait_less_while_it_works_and_as_before_afterwards(tmp_path: Path) -> None:
    before = sys.getswitchinterval()
    with worker(tmp_path / "worker-1.sock", SAMPLE) as one:
        ask(Exposition(lambda: [one.path]))
        assert one.intervals == [pytest.approx(metrics.SWITCH_INTERVAL)]
    assert sys.getswitchinterval() == before
