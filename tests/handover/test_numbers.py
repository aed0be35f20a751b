"""Over very many connections of all kinds, the metrics and the status say exactly what the lines of the log say.

Meanwhile the service is reloaded and upgraded, connections end for each cause, and somebody looks ten times a second.
"""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from tests.causes import CAUSES, DAMAGE, ERROR, HEADER, KEYS, World, causes, get, keys, world
from tests.counting import LOCAL, Service, exchange, wait_for_end
from tests.numbers import Numbers, ask, samples
from tests.support import PATIENCE, eventually, free_port

pytest.importorskip("prometheus_client", reason="prometheus_client is not here: apt install python3-prometheus-client")

CROWD = [sys.executable, "-IS", str(Path(__file__).parent / "crowd.py")]

# Of each proxy that the crowd comes to: how many clients of each kind, as crowd.py names them.
WANTED = {
    "plain": {"talk": 24_000, "more": 6_000, "leave": 12_000, "close": 6_000, "abort": 6_000, "look": 4_000},
    "unix": {"talk": 20_000, "close": 6_000, "bulk": 600},
    "routes": {"a": 6_000, "b": 4_000, "c": 2_000},
    "header": {"via": 6_000},
    "crowded": {"close": 3_000},
    # Others come to these too.
    "allow": {"none": 1_000},
    "deny": {"none": 2_000},
    "nobody": {"none": 2_000},
}

LEAST = 100_000


class Crowd:
    """Very many clients, in processes of their own. addresses: of the proxies that they come to."""

    def __init__(self, addresses: Mapping[str, str]) -> None:
        words = [
            f"{kind}={addresses[proxy]}={number}" for proxy, each in WANTED.items() for kind, number in each.items()
        ]
        self._processes = [
            subprocess.Popen([*CROWD, "clients", *part], stdout=subprocess.PIPE) for part in (words[::2], words[1::2])
        ]

    @property
    def there(self) -> bool:
        """Whether they still come."""
        return any(process.poll() is None for process in self._processes)

    def errors(self) -> list[str]:
        """What went wrong, at the end."""
        return [error for process in self._processes for error in json.loads(process.communicate()[0])]

    def kill(self) -> None:
        """Make sure that they are gone."""
        for process in self._processes:
            process.kill()
            process.wait(PATIENCE)
            assert process.stdout
            process.stdout.close()


@contextmanager
def crowded_world() -> Iterator[tuple[World, Crowd]]:
    """The service, with more proxies, before backends that are fast, and the crowd that comes to it."""
    with TemporaryDirectory() as folder:
        tcp, unix = f"{LOCAL}:{free_port()}", f"{folder}/backend"
        proxies: dict[str, dict[str, Any]] = {
            "plain": {"backends": [tcp, unix]},
            "unix": {"listen": f"{folder}/unix", "backend": unix},
            "routes": {"routes": [{"host": "a.example", "pool": "fast"}, {"host": "b.example", "backend": unix}]},
            "header": {"backend": unix, "accept_proxy": LOCAL},
            "crowded": {"backend": tcp, "max_connections_per_client": 8},
        }
        with subprocess.Popen([*CROWD, "backend", tcp, unix], stdout=subprocess.PIPE) as backend:
            try:
                assert backend.stdout
                assert backend.stdout.readline()
                with world(proxies, {"fast": {"backends": [tcp, unix]}}) as it:
                    places = {name: f"{LOCAL}:{port}" for name, port in it.service.ports.items()}
                    crowd = Crowd({**places, "unix": f"{folder}/unix"})
                    try:
                        yield it, crowd
                    finally:
                        crowd.kill()
            finally:
                backend.kill()


def go_through_it_all(it: World) -> None:
    """Connections that stay over reloads and two upgrades, where some do not go on; and ends for each cause."""
    service = it.service
    stay = it.looked_at_while_open("web", "others", "drained", "few")
    [guest] = it.looked_at_while_open("guest")
    service.reload("reload failed", guest={"listen": "nonsense", "backend": "x:1"})
    service.reload(guest=None, **it.without_haste())
    begun = [service.come("told", HEADER[:9]), service.come("sites", get("a.example")[:-1])]
    assert service.upgrade() == 0
    for client in (*stay, guest):
        exchange(client, b"again")
    guest.close()
    for size in (10, 200_000):
        service.talk("damaged", b"y" * size)
    it.looked_at_while_open("damaged")
    service.program(ERROR + DAMAGE)
    assert service.upgrade() == 0
    service.program(ERROR)
    it.looker.again()
    service.reload()
    begun[0].sendall(HEADER[9:])
    begun[1].sendall(b"\n")
    for client in (*stay, *begun):
        client.shutdown(socket.SHUT_WR)
        wait_for_end(client)
    it.every_cause()


def test_over_100000_connections_the_numbers_of_the_metrics_are_those_of_the_log(
    record_property: Callable[[str, object], None],
) -> None:
    began = time.monotonic()
    rounds = 0
    with crowded_world() as (it, crowd):
        service = it.service
        while crowd.there:
            go_through_it_all(it)
            rounds += 1
        assert crowd.errors() == []
        found = service.agrees()
        seconds = time.monotonic() - began
        came = {proxy: sum(each.values()) for proxy, each in WANTED.items()}
        assert {proxy: found["accepted", proxy] for proxy in came} == {
            proxy: number + rounds * (proxy in ("allow", "deny", "nobody")) for proxy, number in came.items()
        }
        assert causes(found) == CAUSES - {"drain-timeout"}
        assert keys(found) == KEYS
        assert found["handovers",] == 2 * rounds
        assert of_proxies(service, "rspd_open_connections") == dict.fromkeys(service.proxies, 0)
        connected = of_proxies(service, "rspd_connect_seconds_count")
        for proxy in ("plain", "unix", "header", "crowded"):
            assert connected[proxy] == sum(number for key, number in found.items() if reached(proxy, key))
        it.looked_at_while_open("drained")
        with service.come("web"):
            eventually(lambda: service.open == 2)
            service.process.send_signal(signal.SIGTERM)
            assert causes(service.agrees(still_open=1)) == CAUSES
        assert service.process.wait(PATIENCE) == 0
        accepted, refused = (total(service.log.numbers, name) for name in ("accepted", "refused"))
        service.log.read()
        assert service.log.lines[-1].endswith(f" ended served={accepted + 1 - refused}")
    number = total(found, "accepted")
    said = f"{number:,} clients, {2 * rounds} handovers, {it.looker.looks} looks, {seconds:.0f} s"
    record_property("numbers agree", said)
    assert number >= LEAST


def of_proxies(service: Service, metric: str) -> dict[str, float]:
    """A metric of each proxy."""
    found: Counter[str] = Counter()
    for name, labels, value in samples(ask(service.metrics, "/metrics")):
        if name == metric:
            found[labels["proxy"]] += value  # type: ignore[assignment]
    return dict(found)


def reached(proxy: str, key: tuple[str, ...]) -> bool:
    """Whether a number is one of connections of a proxy that reached a backend."""
    return key[:2] == ("ends", proxy) and key[2] != "-"


def total(numbers: Numbers, name: str) -> int:
    """The sum of all numbers with this name."""
    return sum(number for key, number in numbers.items() if key[0] == name)
