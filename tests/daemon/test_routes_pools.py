"""The process, pools that several routes share, and reloads while clients are on their way to a route."""

from __future__ import annotations

import socket
import threading
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.sites import answer_to, come, get, lead, site_of, sites
from tests.fleet import File, stays, talks
from tests.manager import service
from tests.routing.clients import hello
from tests.support import Backend, eventually, free_port, is_reset, receive_all

LOCAL = "127.0.0.1"

# Pools


def many_routes(pool: str) -> list[dict[str, str]]:
    """Six routes that name a pool."""
    return [*({"host": f"{number}.org", "pool": pool} for number in range(5)), {"pool": pool}]


def test_a_pool_is_checked_once_however_many_routes_and_proxies_name_it(tmp_path: Path) -> None:
    release = threading.Event()
    with Backend(lambda _: release.wait(20)) as slow, Backend(lambda sock: None) as quick:
        pools = {
            # As long as one check has no answer, the next one of the same checker has to wait.
            "web": {"backend": slow.address, "health": {"http": "/", "interval": "10ms", "timeout": "20s"}},
            "clock": {"backend": quick.address, "health": {"interval": "10ms"}},
        }
        proxies = {
            name: {
                "listen": f"{LOCAL}:{free_port()}",
                "routes": [{"protocol": "ssh", "pool": "clock"}, *many_routes("web")],
            }
            for name in ("a", "b", "c")
        }
        third = {"c": proxies.pop("c")}
        file = File(tmp_path, listen=None, proxies=proxies, pools=pools)
        with file.rspd() as daemon:
            eventually(lambda: slow.accepted and quick.accepted > 20)
            assert slow.accepted == 1
            file.reload(daemon, proxies={**proxies, **third})
            before = quick.accepted
            eventually(lambda: quick.accepted > before + 20)
            assert slow.accepted == 1
            release.set()


def test_a_backend_of_a_pool_is_down_for_all_routes_that_name_it_and_that_is_told_once(tmp_path: Path) -> None:
    with sites("one") as site:
        down = f"{LOCAL}:{free_port()}"
        pools = {"web": {"backends": [down, site["one"]]}}
        with File(tmp_path, routes=many_routes("web"), pools=pools).rspd() as daemon:
            for number in range(5):
                assert lead(daemon, get(f"{number}.org")) == "one"
            (line,) = daemon.find("backend down")
            assert line.endswith(f'backend down pool=web backend={down} reason="Connection refused"')


def test_a_pool_at_the_top_is_one_for_all_proxies(tmp_path: Path) -> None:
    one, two = free_port(), free_port()
    with sites("web", "own") as site:
        proxies: dict[str, Any] = {
            "a": {"listen": f"{LOCAL}:{one}", "routes": [{"path": "/", "pool": "web"}]},
            "b": {"listen": f"{LOCAL}:{two}", "routes": [{"path": "/", "pool": "web"}]},
            "c": {
                "listen": f"{LOCAL}:0",
                "pools": {"web": {"backend": site["own"]}},
                "routes": [{"path": "/", "pool": "web"}],
            },
        }
        pools = {"web": {"backend": {"address": site["web"], "max_connections": 1}, "queue_timeout": "100ms"}}
        with File(tmp_path, listen=None, proxies=proxies, pools=pools).rspd() as daemon:
            with come(daemon, get(), port=one) as first:
                assert site_of(first) == "web"
                with come(daemon, get(), port=two) as second:
                    assert answer_to(second)[0].status == 503
            daemon.wait_for(f'proxy=a route="/" protocol=http backend={site["web"]}')
            daemon.wait_for('proxy=b route="/" protocol=http backend=- .* cause=queue-timeout')
            assert lead(daemon, get(), port=two) == "web"
            third = int(daemon.find("listening .* proxy=c")[0].partition("127.0.0.1:")[2].split()[0])
            assert lead(daemon, get(), port=third) == "own"


def test_where_a_backend_of_a_shared_pool_goes_down_the_connections_of_all_proxies_end(tmp_path: Path) -> None:
    one, two = free_port(), free_port()
    with Backend(stays("web!")) as web:
        proxies = {
            "a": {"listen": f"{LOCAL}:{one}", "routes": {"path": "/", "pool": "web"}},
            "b": {"listen": f"{LOCAL}:{two}", "routes": {"path": "/", "pool": "web", "idle_timeout": "off"}},
        }
        check = {"address": f"{LOCAL}:{free_port()}", "interval": "10ms", "fall": 1}
        pools = {"web": {"backend": web.address, "on_down": "abort"}}
        file = File(tmp_path, listen=None, proxies=proxies, pools=pools)
        with file.rspd() as daemon, come(daemon, get(), port=one) as first, come(daemon, get(), port=two) as second:
            assert site_of(first) == site_of(second) == "web"
            file.reload(daemon, pools={"web": {**pools["web"], "health": check}})
            assert is_reset(first)
            assert is_reset(second)
            assert [end["cause"] for end in daemon.wait_for_ends(2)] == ["backend-down"] * 2
            assert len(daemon.find("backend down pool=web")) == 1


def test_each_pool_has_its_own_backends_and_rules(tmp_path: Path) -> None:
    with sites("one", "two", "three") as site:
        spare = {"address": site["two"], "backup": True}
        pools = {
            "all": {"backends": [site["one"], site["two"]]},
            "spare": {"backends": [f"{LOCAL}:{free_port()}", spare]},
        }
        routes = [{"host": "a.org", "pool": "all"}, {"host": "b.org", "pool": "spare"}, {"backend": site["three"]}]
        file = File(tmp_path, routes=routes, pools=pools)
        with service("-c", str(file.path)) as daemon:
            assert sorted(lead(daemon, get("a.org")) for _ in range(4)) == ["one", "one", "two", "two"]
            assert [lead(daemon, get("b.org")) for _ in range(3)] == ["two"] * 3
            assert lead(daemon, get("c.org")) == "three"
            counts = "a.org 4, b.org 3, default 1"
            daemon.notify.wait_for_status(rf".*, 8 served, 4 of 5 backends up \(.* down: .*\), by route: {counts}")


def test_a_route_keeps_its_own_timeouts(tmp_path: Path) -> None:
    with sites("web") as site:
        routes = [{"host": "a.org", "pool": "web", "idle_timeout": "1s"}, {"pool": "web"}]
        with File(tmp_path, routes=routes, pools={"web": {"backend": site["web"]}}).rspd() as daemon:
            with come(daemon, get("a.org")) as short, come(daemon, get("b.org")) as long:
                assert site_of(short) == site_of(long) == "web"
                assert daemon.wait_for_ends(1)[0]["cause"] == "idle-timeout"
                assert long.recv(1000) == get("b.org")
                assert talks(long)


# Reloads while something is on its way


@pytest.mark.parametrize("data", [get("a.org"), hello("a.org")], ids=["http", "tls"])
def test_heads_that_are_half_read_go_by_the_new_routes(tmp_path: Path, data: bytes) -> None:
    with sites("old", "new") as site:

        def routes(name: str) -> list[dict[str, str]]:
            return [{match: "a.org", "backend": site[name]} for match in ("host", "server_name")]

        file = File(tmp_path, routes=routes("old"))
        with file.rspd() as daemon, ExitStack() as stack:
            halves = [stack.enter_context(come(daemon, data[:place])) for place in range(0, len(data), 5)]
            with come(daemon, data) as whole:
                assert site_of(whole) == "old"
                file.reload(daemon, routes=routes("new"))
                for client, place in zip(halves, range(0, len(data), 5), strict=True):
                    client.sendall(data[place:])
                    assert site_of(client) == "new"
                    client.shutdown(socket.SHUT_WR)
                    assert receive_all(client) == data
                assert whole.recv(1000) == data
                assert talks(whole)


def test_a_client_that_has_yet_to_speak_may_speak_what_only_the_new_routes_ask_for(tmp_path: Path) -> None:
    with sites("old", "new") as site:
        file = File(tmp_path, routes=[{"server_name": "a.org", "backend": site["old"]}])
        with file.rspd() as daemon, come(daemon) as client:
            assert lead(daemon, hello("a.org")) == "old"
            file.reload(daemon, routes=[{"host": "a.org", "backend": site["new"]}])
            client.sendall(get("a.org"))
            assert site_of(client) == "new"


def test_a_client_that_has_yet_to_speak_gets_the_one_backend_where_a_reload_takes_the_routes_out(
    tmp_path: Path,
) -> None:
    with sites("old", "new") as site:
        file = File(tmp_path, routes=[{"host": "a.org", "backend": site["old"]}])
        with file.rspd() as daemon, come(daemon, get("a.org")[:10]) as client:
            assert lead(daemon, get("a.org")) == "old"
            file.reload(daemon, routes=None, backend=site["new"])
            assert lead(daemon, b"\0") == "new"
            client.sendall(get("a.org")[10:])
            assert site_of(client) == "new"


def test_a_reload_may_bring_routes_and_take_them_out(tmp_path: Path) -> None:
    with sites("one", "two") as site:
        file = File(tmp_path, backend=site["one"])
        with file.rspd() as daemon, come(daemon, get("a.org")) as client:
            assert site_of(client) == "one"
            file.reload(daemon, backend=None, routes=[{"host": "a.org", "backend": site["two"]}])
            assert lead(daemon, get("a.org")) == "two"
            with come(daemon, b"\0") as refused:
                assert is_reset(refused)
            assert client.recv(1000) == get("a.org")
            assert talks(client)
            file.reload(daemon, backend=site["one"], routes=None)
            assert lead(daemon, b"\0") == "one"


def test_a_client_that_waits_for_a_pool_that_a_reload_takes_out_is_told_so_in_time(tmp_path: Path) -> None:
    with sites("full", "other") as site:
        web = {"backend": {"address": site["full"], "max_connections": 1}, "queue_timeout": "300ms"}
        file = File(tmp_path, routes=[{"host": "a.org", "pool": "web"}], pools={"web": web}, log_level="debug")
        with file.rspd() as daemon, come(daemon, get("a.org")) as first:
            assert site_of(first) == "full"
            with come(daemon, get("a.org")) as waiting:
                # Who comes later, and is refused, tells that the one before has been read.
                with come(daemon, get("b.org")) as third:
                    assert answer_to(third)[0].status == 404
                file.reload(daemon, routes=[{"host": "a.org", "backend": site["other"]}], pools=None)
                assert lead(daemon, get("a.org")) == "other"
                response, _ = answer_to(waiting)
                assert response.status in (502, 503)
            assert first.recv(1000) == get("a.org")
            assert talks(first), "who has a backend keeps it"
            lines = daemon.wait_for('closed .* route="a.org" .* backend=- .* cause=(queue-timeout|backend-unknown)')
            assert len(lines) == 1


def test_a_pool_that_stays_over_a_reload_keeps_what_it_knows_and_serves_who_waits(tmp_path: Path) -> None:
    with sites("web") as site:
        web = {"backend": {"address": site["web"], "max_connections": 1}, "queue_timeout": "20s"}
        file = File(tmp_path, routes=[{"host": "a.org", "pool": "web"}], pools={"web": web})
        with file.rspd() as daemon, come(daemon, get("a.org")) as first:
            assert site_of(first) == "web"
            with come(daemon, get("a.org")) as waiting:
                with come(daemon, get("b.org")) as third:
                    assert answer_to(third)[0].status == 404
                file.reload(daemon, routes=[{"host": "c.org", "pool": "web"}])
                first.close()
                assert site_of(waiting) == "web"
