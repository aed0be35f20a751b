"""The process in front of a PostgreSQL cluster: clients reach the server that Patroni calls the primary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

from tests.fleet import File, enter, stays, talks
from tests.support import Backend, Daemon, eventually, free_port, is_reset, rspd
from tests.test_documentation import EXAMPLES

[EXAMPLE] = [text for text in EXAMPLES.values() if "http: /primary" in text]


class Server(Backend):
    """A server of the cluster: PostgreSQL, which tells its name here, and Patroni's REST API at another port.

    role: as Patroni has it. asked: the requests so far.
    """

    def __init__(self, name: str, host: str, ports: tuple[int, int], role: str) -> None:
        self.role = role
        self.asked: list[str] = []
        server = self

        class Api(BaseHTTPRequestHandler):
            """Patroni's own is derived from this class too. Statuses as in its documentation (REST API)."""

            def do_GET(self) -> None:
                server.asked.append(self.requestline)
                role = server.role
                roles = {"/": "primary", "/primary": "primary", "/read-write": "primary", "/replica": "replica"}
                good = role == roles.get(self.path.partition("?")[0], role)
                told = {"state": "running", "role": role, "server_version": 150005, "patroni": {"scope": "batman"}}
                body = json.dumps(told).encode()
                self.send_response(200 if good else 503)
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        super().__init__(stays(name), port=ports[0], host=host)
        self._api = ThreadingHTTPServer((host, ports[1]), Api)
        self._thread = Thread(target=self._api.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def api_port(self) -> int:
        return self._api.server_port

    def close(self) -> None:
        self.stop_patroni()
        super().close()

    def stop_patroni(self) -> None:
        """Patroni ends; PostgreSQL goes on."""
        self._api.shutdown()
        self._thread.join()
        self._api.server_close()


@contextmanager
def cluster(roles: Sequence[str]) -> Iterator[list[Server]]:
    """Servers A, B and so on, each with a host of its own."""
    ports = (free_port(), free_port())
    with ExitStack() as stack:
        yield [
            stack.enter_context(Server(name, f"127.0.0.{number}", ports, role))
            for number, (name, role) in enumerate(zip("ABC", roles, strict=False), 21)
        ]


@contextmanager
def example(folder: Path, servers: Sequence[Server]) -> Iterator[Daemon]:
    """rspd with the example of rspd.yaml(5), for these servers, with a shorter interval; it knows the primary."""
    text = re.sub("listen: .*", "listen: 127.0.0.1:0", EXAMPLE)
    text = re.sub("backends: .*", f"backends: [{', '.join(server.address for server in servers)}]", text)
    text = text.replace("port: 8008", f"port: {servers[0].api_port}").replace("interval: 1s", "interval: 50ms")
    file = folder / "rspd.yaml"
    file.write_text(text)
    with rspd("-c", str(file), listen=()) as daemon:
        daemon.wait_for("backend down", len(servers) - 1)
        yield daemon


def test_clients_reach_the_primary_and_only_patroni_is_asked_who_that_is(tmp_path: Path) -> None:
    with cluster(["replica", "primary", "replica"]) as servers, example(tmp_path, servers) as daemon:
        for line in daemon.find("backend down"):
            assert 'reason="status 503, expected 200"' in line
        for _ in range(5):
            name, client = enter(daemon)
            client.close()
            assert name == "B"
        assert {request for server in servers for request in server.asked} == {"GET /primary HTTP/1.0"}


def test_when_another_server_becomes_primary_connections_to_the_old_one_end_and_clients_wait_for_the_new_one(
    tmp_path: Path,
) -> None:
    with cluster(["primary", "replica"]) as (old, new), example(tmp_path, [old, new]) as daemon:
        name, client = enter(daemon)
        with client:
            assert name == "A"
            old.role = "replica"
            assert is_reset(client)
        daemon.wait_for(f"backend down backend={old.address} reason=")
        with daemon.connect() as waiting:
            daemon.wait_for_ends(1)
            asked = len(new.asked)
            eventually(lambda: len(new.asked) > asked + 2)
            assert new.accepted == 0
            new.role = "primary"
            assert waiting.recv(1) == b"B"
            assert talks(waiting)
        assert [end["cause"] for end in daemon.wait_for_ends(2)] == ["backend-down", "client-closed"]


def test_a_server_whose_patroni_does_not_answer_is_no_primary_and_the_log_names_the_port(tmp_path: Path) -> None:
    with cluster(["primary", "replica"]) as (primary, replica), example(tmp_path, [primary, replica]) as daemon:
        port = primary.api_port
        primary.stop_patroni()
        (line,) = daemon.wait_for(f"backend down backend={primary.address}")
        assert line.endswith(f'reason="{primary.host}:{port}: Connection refused"')


def test_a_reload_may_say_another_way_how_backends_are_checked_and_open_connections_go_on(tmp_path: Path) -> None:
    with cluster(["primary", "replica", "replica"]) as servers:
        first, second, _ = (server.address for server in servers)
        ask = {"interval": "50ms", "rise": 1, "fall": 2, "http": "/primary"}
        api = {"health": {**ask, "address": f"{servers[0].host}:{servers[0].api_port}"}}
        at_port = {"port": servers[0].api_port}
        file = File(tmp_path, backends=[first, second], health={**ask, **at_port})
        with file.rspd() as daemon, ExitStack() as stack:
            daemon.wait_for(f"backend down backend={second}")
            clients = []

            def come() -> None:
                name, client = enter(daemon)
                assert name == "A"
                clients.append(stack.enter_context(client))

            come()
            # The second asks where the first does.
            file.reload(daemon, backends=[first, {"address": second, **api}])
            daemon.wait_for(f"backend up backend={second}")
            file.reload(daemon, backends=[first, {"address": second, "health": {**ask, **at_port}}], health="off")
            daemon.wait_for(f"backend down backend={second}", 2)
            come()
            file.reload(
                daemon, backends=[{"address": first, "max_fails": "off", **api}, {"address": second, "backup": True}]
            )
            come()
            file.reload(daemon, backends=[first, {"address": second, "health": "off"}], health={**ask, **at_port})
            assert all(talks(client) for client in clients)
        assert not daemon.find("connection closed .* cause=(?!client-closed)")
