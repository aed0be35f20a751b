"""The process and clients that get no backend: what they receive, in their own protocol, and that it arrives whole."""

from __future__ import annotations

import re
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from rspd.protocols.http import PREFACE
from tests.daemon.sites import answer_to, come, get, site_of, sites
from tests.fleet import File
from tests.routing.clients import hello
from tests.support import Backend, Daemon, free_port, full_tcp, is_reset, receive_all, reset

POST = b"POST / HTTP/1.1\r\nHost: a.org\r\nContent-Length: 40960\r\n\r\n" + b"x" * 40960


def alert(description: int) -> bytes:
    """A fatal alert of TLS."""
    return bytes((21, 3, 1, 0, 2, 2, description))


@contextmanager
def dead() -> Iterator[dict[str, Any]]:
    """Keys of a backend that refuses connections."""
    yield {"backend": f"127.0.0.1:{free_port()}"}


@contextmanager
def late() -> Iterator[dict[str, Any]]:
    """Keys of a backend that does not answer."""
    with full_tcp() as address:
        yield {"backend": address, "connect_timeout": "200ms"}


@contextmanager
def full() -> Iterator[dict[str, Any]]:
    """Keys of a backend that has all the connections that it may have; the one is a client's that the test has."""
    with sites("full") as site:
        yield {"backend": {"address": site["full"], "max_connections": 1}, "queue_timeout": "200ms"}


@contextmanager
def checked_down() -> Iterator[dict[str, Any]]:
    """Keys of a backend that its checks find down."""
    health = {"interval": "20ms", "fall": 1}
    yield {"backend": f"127.0.0.1:{free_port()}", "health": health}


@contextmanager
def unknown() -> Iterator[dict[str, Any]]:
    """Keys of a backend whose name has no address."""
    yield {"backend": "nobody.invalid:80"}


Trouble = Callable[[], Any]

TROUBLES: Mapping[str, tuple[Trouble, int]] = {
    "backend-refused": (dead, 502),
    "backend-unknown": (unknown, 502),
    "backend-down": (checked_down, 503),
    "queue-timeout": (full, 503),
    "connect-timeout": (late, 504),
}


@contextmanager
def troubled(folder: Path, cause: str) -> Iterator[Daemon]:
    """rspd, and a backend for all that cannot be reached for this cause."""
    with ExitStack() as stack:
        keys = stack.enter_context(TROUBLES[cause][0]())
        matches = ("host", "server_name")
        routes: list[dict[str, object]] = [{match: "a.org", "pool": "web"} for match in matches]
        routes += [{"protocol": ["ssh", "http2"], "pool": "web"}]
        daemon = stack.enter_context(File(folder, routes=routes, pools={"web": keys}).rspd())
        if cause == "backend-down":
            daemon.wait_for("backend down")
        if cause == "queue-timeout":
            client = stack.enter_context(come(daemon, get("a.org")))
            assert site_of(client) == "full"
        yield daemon


@pytest.mark.parametrize("cause", TROUBLES)
def test_an_http_client_is_told_what_is_wrong_with_the_backend(tmp_path: Path, cause: str) -> None:
    status = TROUBLES[cause][1]
    with troubled(tmp_path, cause) as daemon:
        # Nobody has read the body; the answer arrives all the same.
        for data in (get("a.org"), POST):
            with come(daemon, data) as client:
                response, body = answer_to(client)
                assert response.status == status
                assert response.headers["Retry-After"] == ("5" if status == 503 else None)
                assert f"{status} {response.reason}".encode() in body
        with come(daemon, get("a.org", method="HEAD")) as client:
            response, body = answer_to(client, "HEAD")
            assert (response.status, body) == (status, b"")
        lines = daemon.wait_for("cause=" + cause, 3)
        for line in lines:
            assert " WARNING connection closed client=127.0.0.1:" in line
            assert ' route="a.org" name="a.org" protocol=http backend=- sent=0 received=0 ' in line


@pytest.mark.parametrize("cause", ["backend-refused", "queue-timeout", "connect-timeout"])
def test_a_tls_client_is_told_that_it_is_no_fault_of_its_own(tmp_path: Path, cause: str) -> None:
    with troubled(tmp_path, cause) as daemon:
        with come(daemon, hello("a.org") + b"x" * 40960) as client:
            assert receive_all(client) == alert(80)
        daemon.wait_for(rf'route="a.org#2" name="a.org" protocol=tls backend=- .* cause={cause}')


@pytest.mark.parametrize("data", [b"SSH-2.0-x\r\n", PREFACE], ids=["ssh", "http2"])
def test_in_other_protocols_there_is_only_the_end(tmp_path: Path, data: bytes) -> None:
    with troubled(tmp_path, "backend-refused") as daemon, come(daemon, data) as client:
        try:
            assert receive_all(client) == b""
        except ConnectionResetError:
            pass
        assert daemon.wait_for_ends(1)[0]["cause"] == "backend-refused"


# Without a route, or without a head


@contextmanager
def strict(folder: Path, **keys: object) -> Iterator[Daemon]:
    """rspd with routes for certain names only, and 200 ms for what is said first."""
    with sites("one") as site:
        routes = [{match: "a.org", "backend": site["one"]} for match in ("host", "server_name")]
        with File(folder, **{"routes": routes, "first_bytes_timeout": "200ms", **keys}).rspd() as daemon:
            yield daemon


BAD_REQUESTS = [
    (get("b.org"), 404, "no-route"),
    (POST.replace(b"a.org", b"b.org"), 404, "no-route"),
    (get(), 404, "no-route"),
    (get("a.org").replace(b"\r\nHost", b"\r\nHost : x\r\nHost"), 400, "bad-head"),
    (b"GET / HTTP/1.1\r\n\r\n", 400, "bad-head"),
    (b"GET / HTTP/1.1\nHost: a.org\n\n", 400, "bad-head"),
    (b"GET / HTTP/1.1\r\nHost: a.org\r\nX: " + b"x" * 20_000, 400, "bad-head"),
    (get("a.org")[:-1], 408, "first-bytes-timeout"),
    (b"GET ", 408, "first-bytes-timeout"),
]


def test_an_http_client_is_told_what_is_wrong_with_its_request(tmp_path: Path) -> None:
    with strict(tmp_path) as daemon:
        for number, (data, status, cause) in enumerate(BAD_REQUESTS, 1):
            with come(daemon, data) as client:
                response, body = answer_to(client)
            assert (response.status, response.headers["Retry-After"]) == (status, None), data[:80]
            assert f"{status} {response.reason}".encode() in body
            line = daemon.wait_for("connection closed", number)[-1]
            assert re.search(rf" INFO +connection closed client=.* protocol=http backend=- .* cause={cause}", line)
            assert ("reason=" in line) is (cause != "no-route")


BAD_HELLOS = [
    (hello("b.org"), 112, "no-route"),
    (hello("b.org") + b"x" * 40960, 112, "no-route"),
    (hello("b.org", 16384), 112, "no-route"),
    (b"\x16\3\1\0\0", 50, "bad-head"),
    (hello("a.org")[:-1], 80, "first-bytes-timeout"),
]


def test_a_tls_client_is_told_what_is_wrong_with_its_hello(tmp_path: Path) -> None:
    with strict(tmp_path) as daemon:
        for number, (data, description, cause) in enumerate(BAD_HELLOS, 1):
            with come(daemon, data) as client:
                assert receive_all(client) == alert(description)
            line = daemon.wait_for("connection closed", number)[-1]
            assert re.search(rf" INFO +connection closed client=.* protocol=tls backend=- .* cause={cause}", line)


def test_who_speaks_something_else_is_reset_at_once(tmp_path: Path) -> None:
    with strict(tmp_path, first_bytes_timeout="1h") as daemon:
        for number, data in enumerate((b"\0", b"SSH-2.0-x\r\n", b"EHLO a.org\r\n"), 1):
            with come(daemon, data) as client:
                assert is_reset(client)
            line = daemon.wait_for("connection closed", number)[-1]
            assert re.search(r" INFO +connection closed client=.* protocol=unknown backend=- .* cause=no-route$", line)


def test_who_says_nothing_is_reset_when_its_time_is_over(tmp_path: Path) -> None:
    with strict(tmp_path) as daemon, come(daemon) as client:
        assert is_reset(client)
        (end,) = daemon.wait_for_ends(1)
        assert (end["protocol"], end["cause"]) == ("silent", "no-route")
        assert float(end["seconds"]) >= 0.2


def test_who_only_looks_whether_the_port_is_open_makes_no_warning(tmp_path: Path) -> None:
    with strict(tmp_path) as daemon:
        come(daemon).close()
        assert daemon.wait_for_ends(1)[0]["cause"] == "client-closed"
        reset(come(daemon))
        assert daemon.wait_for_ends(2)[1]["cause"] == "client-aborted"
        with come(daemon, b"GET / HTTP/1.1\r\n") as client:
            client.shutdown(socket.SHUT_WR)
            assert answer_to(client)[0].status == 400
        assert daemon.wait_for_ends(3)[2]["cause"] == "bad-head"
        assert not daemon.find("WARNING")


def test_the_answer_to_head_has_no_body_whatever_is_wrong_with_its_path(tmp_path: Path) -> None:
    with sites("one") as site:
        routes = [{"host": "a.org", "path": "/x", "backend": site["one"]}]
        with File(tmp_path, routes=routes).rspd() as daemon:
            for path in ("/y", "/x/../y"):
                with come(daemon, get("a.org", path, "HEAD")) as client:
                    assert answer_to(client, "HEAD")[1] == b""
            assert [end.get("name") for end in daemon.wait_for_ends(2)] == ['"a.org"'] * 2


# Pages of the operator's


def test_pages_of_the_operators_take_the_place_of_ours_and_a_reload_reads_them_again(tmp_path: Path) -> None:
    page = tmp_path / "404.html"
    page.write_bytes(b"nothing here")
    with sites("one") as site:
        routes = [{"host": "a.org", "backend": site["one"]}, {"host": "dead", "backend": f"127.0.0.1:{free_port()}"}]
        file = File(tmp_path, routes=routes, error_pages={"404": str(page)})
        with file.rspd() as daemon:
            with come(daemon, get("b.org")) as client:
                assert answer_to(client)[1] == b"nothing here"
            with come(daemon, get("dead")) as client:
                assert b"502 Bad Gateway" in answer_to(client)[1]
            large = bytes(range(256)) * 256
            page.write_bytes(large)
            with come(daemon, get("b.org")) as client:
                assert answer_to(client)[1] == b"nothing here", "nobody has had it read again"
            file.reload(daemon)
            with come(daemon, get("b.org")) as client:
                assert answer_to(client)[1] == large
            page.unlink()
            daemon.signal(signal.SIGHUP)
            daemon.wait_for("reload failed, nothing has changed: .*404.html cannot be read: No such file or directory")
            with come(daemon, get("b.org")) as client:
                assert answer_to(client)[1] == large


# How the connection ends


def test_who_has_its_answer_and_does_not_close_is_closed_and_keeps_nobody_from_ending(tmp_path: Path) -> None:
    with strict(tmp_path) as daemon, come(daemon, get("b.org")) as client:
        assert answer_to(client)[0].status == 404
        assert daemon.wait_for_ends(1)[0]["cause"] == "no-route"
        assert 1.9 < float(daemon.wait_for_ends(1)[0]["seconds"]) < 5


def test_a_large_body_that_is_on_its_way_does_not_destroy_the_answer(tmp_path: Path) -> None:
    with strict(tmp_path) as daemon, come(daemon) as client:
        client.sendall(get("b.org", method="POST"))
        for _ in range(10):
            client.sendall(b"x" * 4096)
        assert answer_to(client)[0].status == 404


def test_a_backend_that_ends_at_once_is_no_trouble_of_the_way_to_it(tmp_path: Path) -> None:
    """From the moment that there is a backend, rspd says nothing of its own."""
    with (
        Backend(reset) as backend,
        File(tmp_path, routes={"host": "a.org", "backend": backend.address}).rspd() as daemon,
    ):
        with come(daemon, get("a.org")) as client:
            assert is_reset(client)
        assert daemon.wait_for_ends(1)[0]["cause"] == "backend-aborted"


# At the end of the process


def test_who_has_yet_to_speak_when_the_process_ends_has_its_time_for_it(tmp_path: Path) -> None:
    with strict(tmp_path, first_bytes_timeout="500ms") as daemon, come(daemon) as silent, come(daemon) as client:
        with come(daemon, get("b.org")) as third:
            assert answer_to(third)[0].status == 404
        daemon.signal(signal.SIGTERM)
        daemon.wait_for("ending connections=")
        client.sendall(get("a.org"))
        assert site_of(client) == "one"
        assert is_reset(silent)
        client.shutdown(socket.SHUT_WR)
        assert receive_all(client) == get("a.org")
        assert daemon.wait() == 0
        assert [end["cause"] for end in daemon.wait_for_ends(3)] == ["no-route", "no-route", "client-closed"]
