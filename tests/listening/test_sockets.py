"""Listeners from systemd: what they are, what they take the place of, and that they stay."""

from __future__ import annotations

import errno
import logging
import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rspd.config.addresses import parse_address
from rspd.engine.loop import Loop
from rspd.errors import ConfigError
from rspd.listening.replacing import Binding, replace_listeners
from rspd.listening.sockets import Part, Sockets, assign, log_replaced
from rspd.net.address import Address, resolve
from rspd.net.listener import Listener, ListenError, adopt_listener
from rspd.net.resolver import Resolver
from rspd.settings import BackendConfig, Config, ProxyConfig
from tests.listening.test_sockets_over_reloads import wanted
from tests.manager import tcp_listener, unix_listener
from tests.net.test_listener import accept, backlog_of, connect, keep, let_go, port_of, serves
from tests.support import PATIENCE, abstract_name, free_port, run

# One end systemd keeps, so that what we close listens on.
Adopt = Callable[..., tuple[socket.socket, Listener]]


pytestmark = pytest.mark.usefixtures("no_descriptor_is_left_open")


@pytest.fixture
def adopt(no_descriptor_is_left_open: None) -> Iterator[Adopt]:
    """A socket, by default TCP on the loopback address, as systemd keeps it, and our listener on it."""
    opened: list[socket.socket | Listener] = []

    def adopt(name: str = "web", kept: socket.socket | None = None) -> tuple[socket.socket, Listener]:
        kept = kept or tcp_listener()
        ours = socket.SocketType(fileno=os.dup(kept.fileno()))
        ours.setblocking(False)
        listener = adopt_listener(name, ours)
        opened.extend((kept, listener))
        return kept, listener

    yield adopt
    for one in opened:
        one.close()


# One listener


def test_an_adopted_listener_knows_its_name_and_address(adopt: Adopt, tmp_path: Path) -> None:
    kept, web = adopt("web")
    port = kept.getsockname()[1]
    assert (web.passed, web.name, web.address) == ("web", f"127.0.0.1:{port}", Address("127.0.0.1", port))
    _, local = adopt("local", unix_listener(f"{tmp_path}/s"))
    assert (local.passed, local.name, local.address) == ("local", f"{tmp_path}/s", Address(path=f"{tmp_path}/s"))
    name = abstract_name()
    _, abstract = adopt("", unix_listener(f"\0{name}"))
    assert (abstract.passed, abstract.name, abstract.address) == ("", f"@{name}", Address(path=f"@{name}"))


def test_a_socket_for_both_families_is_known_by_its_port(adopt: Adopt) -> None:
    kept, listener = adopt("both", tcp_listener("::"))
    assert listener.address == Address(port=kept.getsockname()[1])


@pytest.mark.parametrize("host", ["127.0.0.1", "::"])
def test_an_adopted_listener_accepts_and_its_clients_do_not_wait_for_acknowledgements(adopt: Adopt, host: str) -> None:
    kept, listener = adopt("web", tcp_listener(host))
    with socket.create_connection(("127.0.0.1", kept.getsockname()[1]), PATIENCE):
        sock, _ = accept(listener)
        assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        sock.close()


def test_a_closed_one_goes_on_listening_for_the_next_process(adopt: Adopt) -> None:
    kept, listener = adopt()
    where = kept.getsockname()
    with socket.create_connection(where, PATIENCE) as waiting:
        listener.close()
        with socket.create_connection(where, PATIENCE):
            sock, peer = kept.accept()
            assert peer == waiting.getsockname()
            sock.close()


def test_the_file_of_a_closed_one_stays(adopt: Adopt, tmp_path: Path) -> None:
    _, listener = adopt("local", unix_listener(f"{tmp_path}/s"))
    listener.close()
    assert (tmp_path / "s").is_socket()


# Replacing


def test_adopted_listeners_stay_whatever_else_is_wanted_and_keep_their_backlog(adopt: Adopt, tmp_path: Path) -> None:
    _, web = adopt("web", tcp_listener(backlog=5))
    _, local = adopt("local", unix_listener(f"{tmp_path}/s"))
    listeners = [web, local]
    with connect(web) as waiting:
        for texts in [("127.0.0.1:0",), (), (f"{tmp_path}/other", "127.0.0.1:0"), ("127.0.0.1:0",), ()]:
            listeners = replace_listeners(listeners, wanted(*texts, backlog=99))
            assert listeners[:2] == [web, local]
            assert len(listeners) == 2 + len(texts)
            assert backlog_of(web) == 5
        sock, peer = accept(web)
        assert peer == waiting.getsockname()
        sock.close()
    assert serves(local)


def test_an_adopted_listener_never_stands_aside(adopt: Adopt) -> None:
    """One of our own would, for 127.0.0.1:8080 in place of 8080; and would reset who waits."""
    _, listener = adopt("web", tcp_listener("0.0.0.0"))
    with socket.create_connection(("127.0.0.1", port_of(listener)), PATIENCE) as waiting:
        with pytest.raises(ListenError, match="Address already in use") as caught:
            replace_listeners([listener], wanted(f"127.0.0.1:{port_of(listener)}"))
        assert caught.value.errno == errno.EADDRINUSE
        sock, peer = accept(listener)
        assert peer == waiting.getsockname()
        sock.close()


def test_one_of_our_own_leaves_also_where_an_adopted_one_has_its_address(adopt: Adopt, tmp_path: Path) -> None:
    _, adopted = adopt("web")
    [own] = replace_listeners([], wanted(f"{tmp_path}/own"))
    assert replace_listeners([own, adopted], {}) == [adopted]
    assert not (tmp_path / "own").exists()


# Matching


def proxy(*listen: str, name: str = "", backends: tuple[str, ...] = ("192.0.2.1:80",)) -> ProxyConfig:
    return ProxyConfig(
        tuple(map(parse_address, listen)), tuple(BackendConfig(parse_address(backend)) for backend in backends), name
    )


def config(*listen: str, backends: tuple[str, ...] = ("192.0.2.1:80",)) -> Config:
    return Config((proxy(*listen, backends=backends),))


def several(**listen: tuple[str, ...]) -> Config:
    """Proxies of these names, which listen there."""
    return Config(tuple(proxy(*texts, name=name) for name, texts in listen.items()))


def told(parts: dict[str, Part]) -> dict[str, tuple[list[str | None], list[str]]]:
    """By the proxies' names: the names of the sockets that each takes, and what it is to bind."""
    return {name: ([one.passed for one in own], [str(one) for one in bound]) for name, (own, bound) in parts.items()}


def adopted(adopt: Adopt, *names: str) -> list[Listener]:
    return [adopt(name)[1] for name in names]


@pytest.mark.parametrize(
    ("names", "listen", "to_bind"),
    [
        ((), ("8080", "/run/a"), ("8080", "/run/a")),
        (("a",), ("8080", "/run/a"), ()),
        (("a", "b"), ("8080",), ()),
        (("a",), (), ()),
        (("a",), ("fd://a",), ()),
        (("a", "b"), ("fd://b", "fd://a"), ()),
        (("a", "a", "b"), ("fd://a", "fd://b"), ()),
        (("a",), ("8080", "fd://a", "/run/a"), ("8080", "/run/a")),
        (("unknown", "unknown"), ("fd://unknown",), ()),
    ],
)
def test_passed_sockets_take_the_place_of_listen_unless_it_names_them(
    adopt: Adopt, names: tuple[str, ...], listen: tuple[str, ...], to_bind: tuple[str, ...]
) -> None:
    assert told(assign(config(*listen), adopted(adopt, *names))) == {"": (list(names), list(to_bind))}


@pytest.mark.parametrize(
    ("names", "listen", "errors"),
    [
        ((), ("fd://a",), ["listen fd://a: no such socket from systemd, none was passed; is its socket unit active?"]),
        (
            ("b", "c", "b"),
            ("fd://a",),
            [
                "listen fd://a: no such socket from systemd, passed are b, c",
                "socket 'b' from systemd: not in listen; add fd://b, or stop it",
                "socket 'c' from systemd: not in listen; add fd://c, or stop it",
            ],
        ),
        (("a", "b"), ("fd://a", "8080"), ["socket 'b' from systemd: not in listen; add fd://b, or stop it"]),
        (
            ("a",),
            ("fd://a", "fd://b", "fd://A"),
            [
                "listen fd://b: no such socket from systemd, passed are a",
                "listen fd://A: no such socket from systemd, passed are a",
            ],
        ),
    ],
)
def test_where_listen_names_passed_sockets_each_has_its_counterpart(
    adopt: Adopt, names: tuple[str, ...], listen: tuple[str, ...], errors: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        assign(config(*listen), adopted(adopt, *names))
    assert caught.value.errors == errors


NOBODYS = "socket 'c' from systemd: not in listen; add fd://c, or call it as a proxy (FileDescriptorName=), or stop it"


@pytest.mark.parametrize(
    ("names", "listen", "parts"),
    [
        # Each proxy takes those that have its name, in place of what its `listen` says; the others bind.
        (("a",), {"a": ("80",), "b": ("81",)}, {"a": (["a"], []), "b": ([], ["81"])}),
        (("b", "a", "b"), {"a": (), "b": ("80", "81")}, {"a": (["a"], []), "b": (["b", "b"], [])}),
        ((), {"a": ("80",), "b": ("81", "/run/b")}, {"a": ([], ["80"]), "b": ([], ["81", "/run/b"])}),
        # What `listen` names is taken besides what it has to bind, whatever the proxy is called.
        (("x", "y"), {"a": ("fd://y", "80"), "b": ("fd://x",)}, {"a": (["y"], ["80"]), "b": (["x"], [])}),
        (("a", "x"), {"a": (), "b": ("fd://x",)}, {"a": (["a"], []), "b": (["x"], [])}),
        # A socket that somebody names is not taken by a proxy that has its name.
        (("a",), {"a": ("80",), "b": ("fd://a",)}, {"a": ([], ["80"]), "b": (["a"], [])}),
        # A lone proxy with a name takes all.
        (("x", "y"), {"a": ("80",)}, {"a": (["x", "y"], [])}),
    ],
)
def test_several_proxies_take_the_sockets_they_name_or_those_of_their_own_name(
    adopt: Adopt,
    names: tuple[str, ...],
    listen: dict[str, tuple[str, ...]],
    parts: dict[str, tuple[list[str], list[str]]],
) -> None:
    assert told(assign(several(**listen), adopted(adopt, *names))) == parts


@pytest.mark.parametrize(
    ("names", "listen", "errors"),
    [
        (
            ("c",),
            {"a": ("80",), "b": ("81",)},
            [NOBODYS],
        ),
        (
            ("a",),
            {"a": (), "b": ()},
            ["proxies.b.listen: missing, expected an address, or a socket from systemd named b"],
        ),
        # One that `b` has named is no longer there for `a`.
        (
            ("a",),
            {"a": (), "b": ("fd://a",)},
            ["proxies.a.listen: missing, expected an address, or a socket from systemd named a"],
        ),
        (
            ("b",),
            {"a": ("fd://x", "80"), "b": ()},
            ["proxies.a.listen fd://x: no such socket from systemd, passed are b"],
        ),
        # All that is wrong is said at once.
        (
            ("c",),
            {"a": ("fd://x",), "b": ()},
            [
                "proxies.a.listen fd://x: no such socket from systemd, passed are c",
                "proxies.b.listen: missing, expected an address, or a socket from systemd named b",
                NOBODYS,
            ],
        ),
    ],
)
def test_several_proxies_and_the_sockets_passed_go_together_or_it_is_said_what_does_not(
    adopt: Adopt, names: tuple[str, ...], listen: dict[str, tuple[str, ...]], errors: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        assign(several(**listen), adopted(adopt, *names))
    assert caught.value.errors == errors


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0", "::"])
def test_a_backend_that_is_a_passed_socket_is_refused(adopt: Adopt, host: str) -> None:
    kept, listener = adopt("web", tcp_listener(host))
    backend = f"127.0.0.1:{kept.getsockname()[1]}"
    with pytest.raises(ConfigError, match=f"backend {backend} is this proxy's own listener "):
        assign(config(backends=(backend,)), [listener])
    with pytest.raises(ConfigError, match=f"backend {backend} is this proxy's own listener "):
        assign(config("fd://web", backends=("192.0.2.1:80", backend)), [listener])


def test_a_backend_that_is_a_passed_unix_socket_is_refused(adopt: Adopt, tmp_path: Path) -> None:
    for name in (f"{tmp_path}/s", f"@{abstract_name()}"):
        _, listener = adopt("local", unix_listener(name.replace("@", "\0")))
        with pytest.raises(ConfigError, match="is this proxy's own listener"):
            assign(config(backends=(name,)), [listener])


# What they take the place of


def logged(caplog: pytest.LogCaptureFixture, config: Config, listeners: list[Listener]) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.INFO, "rspd"):
        log_replaced(config, assign(config, listeners))
    assert {record.levelname for record in caplog.records} <= {"INFO"}
    return [record.getMessage() for record in caplog.records]


def test_an_address_that_is_not_listened_on_for_passed_sockets_is_logged(
    adopt: Adopt, caplog: pytest.LogCaptureFixture
) -> None:
    assert logged(caplog, config("8080", "/run/a"), adopted(adopt, "web", "local", "web")) == [
        "not listening on 8080, systemd passed sockets in place of listen: web, local",
        "not listening on /run/a, systemd passed sockets in place of listen: web, local",
    ]


def test_an_address_that_a_passed_socket_has_is_not_logged(
    adopt: Adopt, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    _, web = adopt("web")
    _, both = adopt("both", tcp_listener("::"))
    _, local = adopt("local", unix_listener(f"{tmp_path}/s"))
    listeners = [web, both, local]
    listen = [f"127.0.0.1:{port_of(web)}", str(port_of(both)), f"{tmp_path}/s"]
    assert logged(caplog, config(*listen), listeners) == []
    assert logged(caplog, config(*listen, "/run/a"), listeners) == [
        "not listening on /run/a, systemd passed sockets in place of listen: web, both, local"
    ]


@pytest.mark.parametrize(("names", "listen"), [((), ("8080",)), (("a",), ("fd://a", "8080")), (("a",), ())])
def test_where_nothing_is_replaced_nothing_is_logged(
    adopt: Adopt, caplog: pytest.LogCaptureFixture, names: tuple[str, ...], listen: tuple[str, ...]
) -> None:
    assert logged(caplog, config(*listen), adopted(adopt, *names)) == []


def test_what_is_to_bind_is_bound_beside_what_was_passed(adopt: Adopt, tmp_path: Path) -> None:
    _, web = adopt("web")
    [part] = assign(config("fd://web", f"{tmp_path}/own"), [web]).values()
    listeners = replace_listeners(part.adopted, {address: Binding(resolve(address), 8) for address in part.addresses})
    assert [listener.passed for listener in listeners] == ["web", None]
    assert all(serves(listener) for listener in listeners)
    listeners[1].close()


# Those of the process before


def test_the_first_opening_takes_or_closes_what_was_kept_and_a_later_one_knows_nothing_of_it(tmp_path: Path) -> None:
    texts = [f"127.0.0.1:{free_port()}", f"{tmp_path}/stays", f"127.0.0.1:{free_port()}"]
    before = replace_listeners([], wanted(*texts))
    kept = [keep(listener) for listener in before]

    async def main(loop: Loop) -> None:
        sockets = Sockets(loop, Resolver(loop), [], kept)
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = f"127.0.0.1:{other.getsockname()[1]}"
            with pytest.raises(ListenError, match="Address already in use"):
                sockets.open(await sockets.plan(config(*texts[:2], taken), patient=True), [])
        # After a failure the kept ones are there for the next attempt.
        first = sockets.open(await sockets.plan(config(*texts[:2]), patient=True), []).proxies[""]
        assert [os.path.sameopenfile(one.fd, old.fd) for one, old in zip(first, before, strict=False)] == [True, True]
        assert all(serves(listener) for listener in first)
        with pytest.raises(ConnectionRefusedError):
            connect(before[2])
        second = sockets.open(await sockets.plan(config(texts[2]), patient=True), first).proxies[""]
        for listener in before:
            let_go(listener)
        assert all(serves(listener) for listener in second)
        assert os.listdir(tmp_path) == []
        for listener in second:
            listener.close()

    run(main)
