"""The process: routes that a reload changes, and what becomes of their pools and of who waits there."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.sites import come, get, lead, site_of, sites
from tests.fleet import File
from tests.manager import service
from tests.routing.clients import hello
from tests.support import receive_all


def one_at_a_time(address: str, **match: Any) -> dict[str, Any]:
    return {**match, "backend": {"address": address, "max_connections": 1}, "queue_timeout": "1h"}


@pytest.mark.parametrize("change", ["a name more", "a name less", "another name", "another kind of match", "a path"])
def test_a_route_that_changes_a_little_keeps_its_pool_and_who_waits_there(tmp_path: Path, change: str) -> None:
    before: dict[str, Any] = {"host": ["a.org", "b.org"]}
    after: dict[str, dict[str, Any]] = {
        "a name more": {"host": ["a.org", "b.org", "c.org"]},
        "a name less": {"host": "b.org"},
        "another name": {"host": "d.org"},
        "another kind of match": {"protocol": "http"},
        "a path": {"host": ["a.org", "b.org"], "path": "/"},
    }
    with sites("one", "two") as site:
        other = {"server_name": "a.org", "backend": site["two"]}
        file = File(tmp_path, routes=[other, one_at_a_time(site["one"], **before)])
        with file.rspd() as daemon, come(daemon, get("b.org")) as first, come(daemon, get("b.org")) as second:
            assert site_of(first) == "one"
            file.reload(daemon, routes=[one_at_a_time(site["one"], **after[change]), other])
            name = {"another name": "d.org", "another kind of match": "x.org"}.get(change, "b.org")
            with come(daemon, get(name)) as third:
                assert lead(daemon, hello("a.org")) == "two"  # so the third one has been read
                first.close()
                assert site_of(second) == "one"
                second.close()
                assert site_of(third) == "one"


def test_two_routes_of_one_name_keep_their_own_pools_where_they_change_places(tmp_path: Path) -> None:
    with sites("http", "tls") as site:
        routes = [one_at_a_time(site["http"], host="a.org"), one_at_a_time(site["tls"], server_name="a.org")]
        file = File(tmp_path, routes=routes)
        with file.rspd() as daemon, come(daemon, get("a.org")) as first, come(daemon, get("a.org")) as second:
            assert site_of(first) == "http"
            file.reload(daemon, routes=routes[::-1])
            assert lead(daemon, hello("a.org")) == "tls"
            first.close()
            assert site_of(second) == "http"


def test_who_waits_for_a_pool_that_a_reload_takes_out_may_still_get_its_backend(tmp_path: Path) -> None:
    with sites("one", "two") as site:
        file = File(tmp_path, routes=[one_at_a_time(site["one"], host="a.org")])
        with file.rspd() as daemon, come(daemon, get("a.org")) as first, come(daemon, get("a.org")) as second:
            assert site_of(first) == "one"
            file.reload(daemon, routes=[{"protocol": "ssh", "backend": site["two"]}])
            assert lead(daemon, b"SSH-2.0-x\r\n") == "two"
            first.close()
            assert site_of(second) == "one"


def test_a_page_that_is_no_file_stops_nobody(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with sites("one") as site:
        routes = [{"host": "a.org", "backend": site["one"]}]
        file = File(tmp_path, routes=routes)
        with file.rspd() as daemon:
            file.write(routes=routes, error_pages={404: f"{tmp_path}/pipe"})
            daemon.signal(signal.SIGHUP)
            daemon.wait_for(f"reload failed, nothing has changed: .* expected a file, {tmp_path}/pipe is something")
            assert lead(daemon, get("a.org")) == "one"
            with come(daemon, get("b.org")) as client:
                assert receive_all(client).startswith(b"HTTP/1.1 404 ")


def test_the_status_names_the_routes_with_the_most_clients_and_counts_the_others(tmp_path: Path) -> None:
    with sites("one") as site:
        routes = [{"host": f"{number}.org", "backend": site["one"]} for number in range(9)]
        with service("-c", str(File(tmp_path, routes=routes).path)) as daemon:
            for number in (8, 8, 8, 6, 6, 0, 1, 2, 3):
                assert lead(daemon, get(f"{number}.org")) == "one"
            told = "by route: 0.org 1, 1.org 1, 2.org 1, 6.org 2, 8.org 3, 1 for 4 more"
            daemon.notify.wait_for_status(f".* 9 served, .*, {told}")
