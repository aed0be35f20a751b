from __future__ import annotations

import pytest

from rspd.commands.troubles import ALL_FULL, troubles
from rspd.snapshot import Backend, Failure, Listener, Pool, Proxy, Rate, Snapshot
from tests.commands.support import FIRST, HOLDER, LONE, PROCESS, REFUSED, lone, process


def test_of_many_places_the_most_silent_client_is_named() -> None:
    (text,) = troubles(lone(name="web", open=100, most=100, full_in=1, listeners=(Listener("80", 1),)), {"web": HOLDER})
    assert text == (
        "web: all places taken: serving 100 of 100, 1 client waits; the client 192.0.2.7:5000 has had its place for"
        " 4 m 10 s (idle 3 m 59 s), the longest of all; raise max_connections, or see"
        " rspd connections --proxy web --sort idle"
    )


def test_advice_is_about_the_service_that_was_asked() -> None:
    (text,) = troubles(
        lone(name="a b", open=1, most=1, full_in=1, listeners=(Listener("80", 1),)), where=" --instance x"
    )
    assert text.endswith("see rspd connections --instance x --proxy 'a b' --sort idle")


def test_places_that_are_taken_are_no_trouble_while_nobody_waits() -> None:
    assert troubles(lone(open=1, most=1, full_in=1)) == []
    (text,) = troubles(lone(open=1, most=1, full_in=1, listeners=(Listener("80", None),)))
    assert text.startswith("all places taken: serving 1 of 1, clients may wait, the kernel does not count them; raise")


def test_one_process_that_is_full_is_told_where_its_clients_wait_for_it_alone() -> None:
    own, shared = Listener("80", 1), Listener("80", 1, "rspd")
    snapshots = [lone(open=1, most=2, full_in=1, listeners=(one,)) for one in (own, shared)]
    processes = PROCESS._replace(processes=2)
    (text,) = troubles(snapshots[0]._replace(process=processes))
    assert text.startswith("all places taken in 1 of 2 processes: serving 1 of 2, 1 client waits; raise")
    assert troubles(snapshots[1]._replace(process=processes)) == []
    assert troubles(lone(open=2, most=2, full_in=2, listeners=(shared,))._replace(process=processes)) != []


def test_a_pool_that_is_out_comes_before_backends_that_are() -> None:
    pools = (Pool("web"), Pool("", "apps", True), Pool("web", "route new", route="new"))
    snapshot = Snapshot(
        PROCESS,
        (Proxy("web"),),
        (),
        pools,
        (
            REFUSED._replace(proxy="web"),
            FIRST._replace(proxy="web"),
            REFUSED._replace(pool="apps", shared=True, state="trial"),
        ),
    )
    assert troubles(snapshot) == [
        "pool apps: no backend is in service: 10.0.0.12:80 has been down for 4 m 10 s: Connection refused",
        "web, route new: no backend is known yet",
        "web: backend 10.0.0.12:80 has been down for 4 m 10 s: Connection refused; 1 of 2 in service",
    ]


def test_of_many_backends_that_are_down_the_last_are_named() -> None:
    down = [Backend(name=f"b:{age}", state="down", state_age=float(age)) for age in (4, 2, 5, 3, 1)]
    (text,) = troubles(LONE._replace(backends=(FIRST, *down)))
    assert text.startswith("5 of 6 backends are down: b:1 has been down for 1 s; b:2 has been down for 2 s; b:3 ")
    assert text.endswith("; and 2 more")
    (text,) = troubles(LONE._replace(backends=tuple(down)))
    assert text.startswith("no backend is in service: b:4 has been down for 4 s; ")
    assert text.endswith("; and 2 more")


@pytest.mark.parametrize(
    ("snapshot", "said"),
    [
        (process(ending=True), "rspd is ending and accepts nobody; 18 connections still open"),
        (
            process(ending=True, processes=3),
            "at least one of 3 processes is ending and accepts nobody; 18 connections still open",
        ),
        (
            process(descriptors=950, descriptors_max=1024),
            "950 of 1,024 descriptors are open: raise LimitNOFILE= of the unit, or lower max_connections",
        ),
        (
            process(failure="/etc/rspd.yaml:3: max: unknown key\n/etc/rspd.yaml:4: \x1b[2J"),
            "the configuration file is not in force: /etc/rspd.yaml:3: max: unknown key; /etc/rspd.yaml:4: \\x1b[2J",
        ),
        (
            process(unanswered=("/run/rspd/worker-2.sock",)),
            "no answer from /run/rspd/worker-2.sock: that process is missing here; see systemctl status rspd-worker@2",
        ),
        (
            LONE._replace(pools=(Pool(queue=2),)),
            f"2 clients wait for a backend: {ALL_FULL}",
        ),
        (
            lone(failures=(Failure("connect-timeout", "10.0.0.11:80", 10, "timed out", 2.0),)),
            "connect-timeout at 10.0.0.11:80 10 times in the last ten minutes, the last one 2 s ago: timed out",
        ),
        (
            lone(failures=(Failure("error", "-", 1, "KeyError", 2.0),)),
            "error once in the last ten minutes, the last one 2 s ago: KeyError",
        ),
    ],
)
def test_what_else_is_wrong_is_said(snapshot: Snapshot, said: str) -> None:
    assert troubles(snapshot) == [said]


@pytest.mark.parametrize(
    "snapshot",
    [
        process(descriptors=900, descriptors_max=1024),
        lone(failures=(Failure("connect-timeout", "10.0.0.11:80", 9, "", 2.0),)),
        lone(failures=(Failure("client-aborted", "10.0.0.11:80", 5000, "", 2.0),)),
        lone(failures=(Failure("backend-refused", "a:1", 50, "", 2.0),), last_minute=Rate(connections=100.0)),
        lone(retired=True, open=5, most=0, listeners=(Listener("80", 3),)),
    ],
)
def test_what_happens_every_day_is_no_trouble(snapshot: Snapshot) -> None:
    assert troubles(snapshot) == []


def test_failures_of_a_backend_that_is_down_are_not_told_twice() -> None:
    snapshot = lone(failures=(Failure("backend-refused", "10.0.0.12:80", 50, "Connection refused", 2.0),))
    assert len(troubles(snapshot._replace(backends=(FIRST, REFUSED)))) == 1


def test_sockets_of_other_users_are_told_in_one_line() -> None:
    said = "left out: another user made"
    assert troubles(LONE._replace(process=PROCESS._replace(strangers=("/tmp/a\x1b",)))) == [
        f"/tmp/a\\x1b is {said} it, and who answers there may lie; remove it"
    ]
    (many,) = troubles(LONE._replace(process=PROCESS._replace(strangers=("/tmp/a", *map(str, range(1000))))))
    assert many == f"/tmp/a and 1,000 more are {said} them, and who answers there may lie; remove them"
