"""The process and who may come: allow, deny, max_connections_per_client, and what the log has of those refused."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.daemon.test_reload import File, connect, receive, says, talk
from tests.manager import service
from tests.support import (
    PATIENCE,
    Backend,
    Daemon,
    echo,
    eventually,
    reset,
    skip_for_kernel,
)

ONE, TWO, THREE = "127.0.0.1", "127.0.0.2", "127.0.0.3"


@pytest.fixture
def backend() -> Iterator[Backend]:
    with Backend(says(b"!")) as backend:
        yield backend


def of(daemon: Daemon, host: str) -> socket.socket:
    """A client that comes from this address."""
    return socket.create_connection(("127.0.0.1", daemon.port), PATIENCE, source_address=(host, 0))


@contextmanager
def served(daemon: Daemon, host: str) -> Iterator[socket.socket]:
    with of(daemon, host) as client:
        assert receive(client, 1) == b"!"
        yield client


def is_served(daemon: Daemon, host: str) -> bool:
    """Whether a client is served; if not, it is reset, perhaps while it connects."""
    try:
        with served(daemon, host):
            return True
    except ConnectionResetError:
        return False


def is_served_at(path: str) -> bool:
    """The same for a client of a unix socket, which has no RST."""
    with connect(path) as client:
        return client.recv(1) == b"!"


def refusals(daemon: Daemon) -> list[dict[str, str]]:
    """The fields of each line about refused clients."""
    lines = daemon.find(" WARNING client refused ")
    return [dict(re.findall(r'(\w+)=("[^"]*"|\S+)', line)) for line in lines]


def told(daemon: Daemon) -> int:
    """Of how many refused clients the log tells."""
    return sum(1 + int(line.get("more", 0)) for line in refusals(daemon))


@pytest.mark.parametrize(
    ("keys", "welcome", "refused", "reason"),
    [
        ({"allow": "127.0.0.2"}, [TWO], [ONE, THREE], "not in allow"),
        ({"allow": ["127.0.0.2/31", "2001:db8::/32"]}, [TWO, THREE], [ONE], "not in allow"),
        ({"deny": "127.0.0.2/31"}, [ONE], [TWO, THREE], "in deny 127.0.0.2/31"),
        ({"allow": "127.0.0.0/8", "deny": [TWO]}, [ONE, THREE], [TWO], "in deny 127.0.0.2"),
        ({"allow": TWO, "deny": "127.0.0.0/8"}, [], [ONE, TWO], "in deny 127.0.0.0/8"),
        ({"allow": "all", "deny": "off"}, [ONE, TWO], [], ""),
    ],
)
def test_who_is_allowed_and_not_denied_is_served_and_another_is_reset_and_costs_no_backend_connection(
    tmp_path: Path, backend: Backend, keys: dict[str, object], welcome: list[str], refused: list[str], reason: str
) -> None:
    file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address, **keys)
    with file.rspd() as daemon:
        for host in refused + welcome + refused:
            assert is_served(daemon, host) is (host in welcome)
        eventually(lambda: told(daemon) == 2 * len(refused))
        assert {line["client"].partition(":")[0] for line in refusals(daemon)} <= set(refused)
        assert {line["reason"] for line in refusals(daemon)} <= {f'"{reason}"'}
        eventually(lambda: len(daemon.find("connection closed")) == len(welcome))
        assert backend.accepted == len(welcome)
    assert len(daemon.find("connection closed")) == len(welcome), "those refused have no other line"
    assert daemon.find(f"ended served={len(welcome)}$")


def test_the_line_names_the_client_the_proxy_and_the_reason(tmp_path: Path, backend: Backend) -> None:
    file = File(tmp_path, proxies={"web": {"listen": "127.0.0.1:0", "backend": backend.address, "allow": TWO}})
    with file.rspd() as daemon, socket.socket() as client:
        client.bind((ONE, 0))
        with pytest.raises(ConnectionResetError):
            client.connect(("127.0.0.1", daemon.port))
            client.recv(1)
        where = f"{ONE}:{client.getsockname()[1]}"
        daemon.wait_for(f' WARNING client refused client={where} proxy=web reason="not in allow"$')


def test_the_word_unix_stands_for_the_clients_of_unix_sockets(tmp_path: Path, backend: Backend) -> None:
    path = f"{tmp_path}/socket"
    file = File(tmp_path, listen=["127.0.0.1:0", path], backend=backend.address, allow="unix")
    with file.rspd() as daemon:
        assert is_served_at(path)
        assert not is_served(daemon, ONE)
        file.reload(daemon, allow=[ONE])
        assert not is_served_at(path)
        assert is_served(daemon, ONE)
        file.reload(daemon, allow="all", deny="unix")
        assert not is_served_at(path)
        assert is_served(daemon, ONE)
        eventually(lambda: told(daemon) == 3)
        assert backend.accepted == 3
        assert 'client=unix reason="in deny unix"' in daemon.log


def test_a_dual_stack_listener_knows_an_ipv4_client_by_its_ipv4_address(tmp_path: Path, backend: Backend) -> None:
    file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address, deny=TWO)
    if not socket.has_dualstack_ipv6():
        skip_for_kernel("no IPv6")
    listener = socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    with listener, service("-c", str(file.path), sockets={"web": listener}) as daemon:
        assert is_served(daemon, ONE)
        assert not is_served(daemon, TWO)


def test_a_reload_that_denies_a_client_leaves_its_open_connection_alone(tmp_path: Path, backend: Backend) -> None:
    file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address, max_connections=5)
    with file.rspd() as daemon, served(daemon, TWO) as client:
        file.reload(daemon, deny=TWO)
        assert not is_served(daemon, TWO)
        talk(client)
        file.reload(daemon, deny=None)
        assert is_served(daemon, TWO)
        talk(client)


def test_a_client_may_have_so_many_connections_at_once_and_another_as_many(tmp_path: Path, backend: Backend) -> None:
    file = File(
        tmp_path, listen="127.0.0.1:0", backend=backend.address, max_connections=9, max_connections_per_client=2
    )
    with file.rspd() as daemon, served(daemon, ONE) as first, served(daemon, TWO), served(daemon, TWO):
        with served(daemon, ONE) as second:
            for host in (ONE, TWO):
                assert not is_served(daemon, host)
            reset(second)
            daemon.wait_for_ends(1)
        with served(daemon, ONE):
            assert not is_served(daemon, ONE)
            assert is_served(daemon, THREE)
        first.close()
        eventually(lambda: len(daemon.find("connection closed client=127.0.0.1:")) == 3)
        with served(daemon, ONE), served(daemon, ONE):
            assert not is_served(daemon, ONE)
        reasons = {line["reason"] for line in refusals(daemon)}
        assert reasons == {'"has 2 connections, max_connections_per_client is 2"'}


def test_unix_clients_are_one_client(tmp_path: Path, backend: Backend) -> None:
    path = f"{tmp_path}/socket"
    keys = {"max_connections": 5, "max_connections_per_client": 1}
    file = File(tmp_path, listen=["127.0.0.1:0", path], backend=backend.address, **keys)
    with file.rspd() as daemon, connect(path) as client, served(daemon, ONE):
        assert receive(client, 1) == b"!"
        assert not is_served_at(path)
        client.close()
        daemon.wait_for_ends(1)
        assert is_served_at(path)


def test_each_proxy_counts_for_itself(tmp_path: Path, backend: Backend) -> None:
    proxies = {name: {"listen": f"{host}:0", "backend": backend.address} for name, host in (("a", ONE), ("b", TWO))}
    file = File(tmp_path, max_connections=5, max_connections_per_client=1, proxies=proxies)
    with file.rspd() as daemon, served(daemon, ONE):
        (other,) = daemon.wait_for(f"listening address={TWO}:")
        with socket.create_connection((TWO, int(re.findall(r":(\d+) proxy=b", other)[0])), PATIENCE) as client:
            assert receive(client, 1) == b"!"
        assert not is_served(daemon, ONE)
        eventually(lambda: told(daemon) == 1)
        assert refusals(daemon)[0]["proxy"] == "a"


def test_a_reload_counts_the_connections_that_there_are_whatever_was_the_limit_before(
    tmp_path: Path, backend: Backend
) -> None:
    file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address, max_connections=20)

    def limit(number: int | str) -> None:
        file.reload(daemon, max_connections_per_client=number)

    def leave(client: socket.socket) -> None:
        ends = len(daemon.find("connection closed"))
        client.close()
        daemon.wait_for_ends(ends + 1)

    with file.rspd() as daemon, ExitStack() as stack:

        def come() -> socket.socket:
            return stack.enter_context(served(daemon, ONE))

        clients = [come() for _ in range(3)]
        limit(2)
        assert not is_served(daemon, ONE)
        leave(clients.pop())
        assert not is_served(daemon, ONE), "there are two still"
        leave(clients.pop())
        clients.append(come())
        assert not is_served(daemon, ONE)
        limit(3)
        clients.append(come())
        assert not is_served(daemon, ONE)
        limit("off")
        clients += [come(), come()]
        limit(4)
        leave(clients.pop(0))  # of five
        assert not is_served(daemon, ONE)
        leave(clients.pop())
        clients.append(come())
        assert not is_served(daemon, ONE)
        limit(4)
        assert not is_served(daemon, ONE)
        for client in clients:
            talk(client)
            leave(client)
        with ExitStack() as again:
            for _ in range(4):
                again.enter_context(served(daemon, ONE))
            assert not is_served(daemon, ONE)


def test_a_client_that_waits_for_a_backend_counts_too(tmp_path: Path) -> None:
    with Backend(echo) as gone:
        pass
    keys = {"max_connections": 5, "max_connections_per_client": 1, "queue_timeout": "1h"}
    file = File(tmp_path, listen="127.0.0.1:0", backend=gone.address, **keys)
    with file.rspd() as daemon:
        with of(daemon, ONE) as waiting:
            daemon.wait_for("backend down")
            assert not is_served(daemon, ONE)
            reset(waiting)
            daemon.wait_for_ends(1)
        with of(daemon, ONE) as client, Backend(says(b"!"), port=gone.port):
            assert receive(client, 1) == b"!"
            client.close()
            daemon.wait_for_ends(2)


def test_thousands_of_refused_clients_make_a_line_a_second_and_all_are_counted_in_it(
    tmp_path: Path, backend: Backend
) -> None:
    count = 3000
    file = File(tmp_path, listen="127.0.0.1:0", backend=backend.address, deny=TWO)
    with file.rspd() as daemon:
        assert not is_served(daemon, TWO)
        assert is_served(daemon, ONE)
        descriptors = len(daemon.descriptors())
        started = time.monotonic()
        for number in range(1, count):
            assert not is_served(daemon, TWO)
            if number % 500 == 0:
                assert is_served(daemon, ONE)
        seconds = time.monotonic() - started
        assert len(daemon.descriptors()) <= descriptors
        # The first at once, and then one a second; those of the last are told within a second, or at the end.
        assert len(refusals(daemon)) <= seconds + 2
        eventually(lambda: told(daemon) == count)
        assert not is_served(daemon, TWO)
        assert not is_served(daemon, TWO)
    assert told(daemon) == count + 2
    served = count // 500
    assert backend.accepted == len(daemon.find("connection closed")) == served
