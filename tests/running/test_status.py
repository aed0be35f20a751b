"""What systemd hears of the process, on a real notify socket."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from rspd.config.addresses import parse_address, parse_backend
from rspd.engine.loop import Loop, Task
from rspd.engine.pipes import Pipes
from rspd.host.systemd import Notifier
from rspd.net.address import resolve
from rspd.net.descriptors import Shortage
from rspd.net.listener import open_listeners
from rspd.net.resolver import Resolver
from rspd.net.ways import Ways
from rspd.routing.pools import PoolMaker
from rspd.running.proxies import Proxies
from rspd.running.status import Reporter
from rspd.settings import BackendConfig, Config, ProxyConfig
from tests.manager import NotifySocket, notify_socket
from tests.support import PATIENCE


@pytest.fixture
def systemd(monkeypatch: pytest.MonkeyPatch) -> Iterator[NotifySocket]:
    with notify_socket() as server:
        monkeypatch.setenv("NOTIFY_SOCKET", server.path)
        monkeypatch.setattr("rspd.running.status.INTERVAL", 0.05)
        yield server


def test_a_reload_that_failed_is_in_the_status_until_the_next_begins(systemd: NotifySocket) -> None:
    address = parse_address("127.0.0.1:0")
    config = Config((ProxyConfig((address,), (BackendConfig(parse_backend("127.0.0.1:1")),)),))
    serving = "serving 0 of 1, 0 served, backend 127.0.0.1:1"

    async def main(loop: Loop) -> None:
        ways = Ways(loop)
        watchers: set[Task] = set()
        shortage = Shortage(loop)
        maker = PoolMaker(loop, shortage, Resolver(loop), ways)
        proxies = Proxies(loop, shortage, Pipes(0), maker, ways, watchers)
        proxies.apply(config, {"": open_listeners(address, resolve(address), 8)})
        notifier = Notifier()
        reporter = Reporter(loop, proxies, watchers, notifier)
        reporter.ready()
        reporter.ready("reload failed: no such file")
        reporter.reloading()
        # What it says of itself while the reload is under way.
        deadline = loop.now + PATIENCE
        while len(systemd.messages) < 4 and loop.now < deadline:
            await loop.sleep(0.01)
        for proxy in proxies.everyone():
            proxy.stop_listening()
        await loop.yield_turn()
        assert notifier._notifier
        notifier._notifier.socket.close()  # for good: the process has it to its end

    with Loop() as loop:
        loop.run(main(loop))
    assert [message.status for message in systemd.messages] == [
        serving,
        f"{serving}; reload failed: no such file",
        "",  # RELOADING=1
        serving,
    ]
