"""The process and clients that say nothing, or never finish: limits hold, and others are served meanwhile."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.daemon.sites import come, get, lead, site_of, sites
from tests.fleet import File
from tests.manager import service
from tests.routing.clients import hello
from tests.support import PATIENCE, Daemon, eventually, is_reset, reset

GIVEN_UP = "others came, and this client had not said all for longest"

HALVES = [b"", hello("a.org")[:-1], get("a.org")[:-1], b"GET /", b"\x16"]


@contextmanager
def limited(folder: Path, limit: int, **keys: object) -> Iterator[Daemon]:
    """rspd with routes, so many places, and all the time there is for what is said first."""
    with sites("one") as site:
        routes = [{match: "a.org", "backend": site["one"]} for match in ("host", "server_name")]
        own = {"routes": routes, "max_connections": limit, "first_bytes_timeout": "1h", **keys}
        with File(folder, **own).rspd() as daemon:
            yield daemon


def is_open(client: socket.socket) -> bool:
    """Whether nothing has come, no end either."""
    client.setblocking(False)
    try:
        client.recv(1)
    except BlockingIOError:
        return True
    except ConnectionResetError:
        pass
    finally:
        client.settimeout(PATIENCE)
    return False


@pytest.mark.parametrize(("limit", "most"), [(2, 1), (3, 1), (10, 5)])
def test_at_most_half_of_the_places_are_for_clients_that_say_nothing(tmp_path: Path, limit: int, most: int) -> None:
    with limited(tmp_path, limit) as daemon, ExitStack() as stack:
        silent = [stack.enter_context(come(daemon)) for _ in range(most + 2)]
        # Those that have waited longest, in order; the others are left alone.
        assert [is_reset(client) for client in silent[:2]] == [True] * 2
        ends = daemon.wait_for_ends(2)
        assert [end["client"] for end in ends] == [f"127.0.0.1:{port_of(client)}" for client in silent[:2]]
        assert {(end["cause"], end["reason"].strip('"')) for end in ends} == {("first-bytes-timeout", GIVEN_UP)}
        assert all(is_open(client) for client in silent[2:])
        assert len(daemon.find("connection closed")) == 2
        assert not daemon.find("WARNING")


def port_of(client: socket.socket) -> int:
    port: int = client.getsockname()[1]
    return port


def test_who_never_finishes_counts_as_who_says_nothing_and_others_are_served(tmp_path: Path) -> None:
    with limited(tmp_path, 10) as daemon, ExitStack() as stack:
        silent = [stack.enter_context(come(daemon, half)) for half in HALVES * 6]
        assert all(is_reset(client) for client in silent[:25])
        for _ in range(5):
            assert lead(daemon, get("a.org")) == lead(daemon, hello("a.org")) == "one"
        # Who is served takes no place of those that are silent, at most one of them for a moment.
        served = [stack.enter_context(come(daemon, get("a.org"))) for _ in range(5)]
        assert [site_of(client) for client in served] == ["one"] * 5
        daemon.wait_for("protocol=(http|tls) backend=127", 10)


def test_one_that_was_silent_may_speak_and_makes_room_for_another(tmp_path: Path) -> None:
    with limited(tmp_path, 4) as daemon, come(daemon) as first, come(daemon) as second:
        first.sendall(get("a.org"))
        assert site_of(first) == "one"
        with come(daemon) as third:
            second.sendall(hello("a.org"))
            assert site_of(second) == "one"
            third.sendall(get("a.org"))
            assert site_of(third) == "one"
        assert not daemon.find("first-bytes-timeout")


def test_with_one_place_a_silent_client_has_it_until_its_time_is_over(tmp_path: Path) -> None:
    with limited(tmp_path, 1, first_bytes_timeout="300ms") as daemon, come(daemon) as silent:
        assert lead(daemon, get("a.org")) == "one"
        assert is_reset(silent)
        first, second = daemon.wait_for_ends(2)
        assert (first["cause"], second["cause"]) == ("no-route", "client-closed")
        assert float(first["seconds"]) >= 0.3


def test_where_no_route_needs_what_clients_say_nobody_is_given_up(tmp_path: Path) -> None:
    with sites("one") as site:
        with File(tmp_path, routes={"backend": site["one"]}, max_connections=4).rspd() as daemon, ExitStack() as stack:
            silent = [stack.enter_context(come(daemon)) for _ in range(4)]
            assert [site_of(client) for client in silent] == ["one"] * 4
            assert not daemon.find("connection closed")


def test_a_reload_may_lower_how_many_may_be_silent(tmp_path: Path) -> None:
    with sites("one") as site:
        file = File(tmp_path, routes={"host": "a.org", "backend": site["one"]}, first_bytes_timeout="1h")
        with file.rspd() as daemon, ExitStack() as stack:
            silent = [stack.enter_context(come(daemon)) for _ in range(9)]
            file.reload(daemon, max_connections=20)
            assert lead(daemon, get("a.org")) == "one"
            assert all(is_open(client) for client in silent)
            file.reload(daemon, max_connections=10)
            silent.append(stack.enter_context(come(daemon)))
            assert is_reset(silent[0])
            eventually(lambda: sum(is_open(client) for client in silent) == 5, patience=1)


def test_the_status_says_how_many_have_yet_to_speak(tmp_path: Path) -> None:
    with sites("one") as site:
        file = File(tmp_path, routes={"host": "a.org", "backend": site["one"]}, first_bytes_timeout="1h")
        with service("-c", str(file.path)) as daemon, ExitStack() as stack:
            for half in HALVES[:1] + HALVES[2:4]:
                stack.enter_context(come(daemon, half))
            daemon.notify.wait_for_status("serving 3 of 1000, 3 yet to say what they want, 3 served, backend .*")
            stack.close()
            daemon.notify.wait_for_status("serving 0 of 1000, 3 served, backend .*")


@pytest.mark.parametrize(
    ("half", "limit"), [(b"", 5000), (hello("a.org", 1500)[:1000], 2000)], ids=["silent", "half a hello"]
)
@pytest.mark.usefixtures("as_many_descriptors_as_allowed")
def test_thousands_of_clients_that_never_finish_take_a_bounded_part_of_memory_and_descriptors(
    tmp_path: Path, half: bytes, limit: int
) -> None:
    # The test has a descriptor for each client, three for every two places. rspd has two for each that is served.
    limit = min(limit, resource.getrlimit(resource.RLIMIT_NOFILE)[1] // 2)
    with limited(tmp_path, limit) as daemon, ExitStack() as stack:
        assert lead(daemon, get("a.org")) == "one"
        before = len(daemon.descriptors())
        clients = [stack.enter_context(come(daemon, half)) for _ in range(limit // 2)]
        eventually(lambda: len(daemon.descriptors()) == before + limit // 2)
        memory = daemon.memory()
        for _ in range(4):
            # Others, in the place of half of those before.
            clients += [stack.enter_context(come(daemon, half)) for _ in range(limit // 4)]
            assert lead(daemon, get("a.org")) == lead(daemon, hello("a.org")) == "one"
        assert len(daemon.descriptors()) <= before + limit // 2 + 4
        assert daemon.memory() < memory + (4 << 20)
        assert all(is_reset(client) for client in clients[: limit // 4])
        for client in clients:
            reset(client)
        eventually(lambda: len(daemon.descriptors()) == before)
        assert lead(daemon, get("a.org")) == "one"


def test_waiting_for_clients_that_say_nothing_costs_no_cpu_time(tmp_path: Path) -> None:
    with limited(tmp_path, 1000) as daemon, ExitStack() as stack:
        for half in HALVES * 20:
            stack.enter_context(come(daemon, half))
        assert lead(daemon, get("a.org")) == "one"
        before = daemon.cpu_seconds()
        # The time for another to pass through rspd a hundred times.
        for _ in range(100):
            assert lead(daemon, get("a.org")) == "one"
        assert daemon.cpu_seconds() - before < 0.5
