from __future__ import annotations

from math import inf

from rspd.admin.merging import merge, merge_connections
from rspd.admin.query import Query
from rspd.snapshot import (
    Backend,
    Checks,
    Connection,
    Connections,
    Distribution,
    Ends,
    Failure,
    Listener,
    Pool,
    Process,
    Proxy,
    Rate,
    Refusals,
    Route,
    Snapshot,
    Volume,
)


def merged_proxy(*them: Proxy) -> Proxy:
    (proxy,) = merge([Snapshot(proxies=(one,)) for one in them]).proxies
    return proxy


def merged_backend(*them: Backend) -> Backend:
    (backend,) = merge([Snapshot(backends=(one,)) for one in them]).backends
    return backend


def merged_process(*them: Process) -> Process:
    return merge([Snapshot(one) for one in them]).process


def test_one_snapshot_is_as_it_was() -> None:
    snapshot = Snapshot(Process(pid=7), (Proxy("a"), Proxy("b")), (Route(),), (Pool(),), (Backend(),))
    assert merge([snapshot]) == snapshot


def test_counts_and_rates_are_added() -> None:
    first = Proxy(
        "web", open=1, most=10, accepted=100, silent=2, queue=3, last_10s=Rate(1, 2, 3), last_minute=Rate(4, 5, 6)
    )
    assert merged_proxy(first, first) == Proxy(
        "web", open=2, most=20, accepted=200, silent=4, queue=6, last_10s=Rate(2, 4, 6), last_minute=Rate(8, 10, 12)
    )


def test_what_is_counted_by_backend_cause_and_reason_is_added_by_these() -> None:
    first = Proxy(
        refused=(Refusals("deny", 1),),
        ends=(Ends("a:1", "client-closed", 1), Ends("a:1", "idle-timeout", 2)),
        volumes=(Volume("a:1", 10, 20),),
        seconds=Distribution((1, 0, 2), 1.5),
        queue_seconds=Distribution((0, 1), 0.5),
    )
    second = Proxy(
        refused=(Refusals("deny", 4), Refusals("allow", 1)),
        ends=(Ends("a:1", "client-closed", 3), Ends("-", "idle-timeout", 5)),
        volumes=(Volume("b:1", 1, 2), Volume("a:1", 1, 2)),
        seconds=Distribution((1, 1, 1), 2.0),
    )
    proxy = merged_proxy(first, second)
    assert proxy.refused == (Refusals("deny", 5), Refusals("allow", 1))
    assert proxy.ends == (
        Ends("a:1", "client-closed", 4),
        Ends("a:1", "idle-timeout", 2),
        Ends("-", "idle-timeout", 5),
    )
    assert proxy.volumes == (Volume("a:1", 11, 22), Volume("b:1", 1, 2))
    assert proxy.seconds == Distribution((2, 1, 3), 3.5)
    assert proxy.queue_seconds == Distribution((0, 1), 0.5)


def test_of_a_failure_the_last_reason_stays() -> None:
    old = Failure("backend-refused", "a:1", 2, "old", ago=300.0)
    new = Failure("backend-refused", "a:1", 1, "new", ago=2.0)
    other = Failure("connect-timeout", "a:1", 1, "slow", ago=5.0)
    merged = merged_proxy(Proxy(failures=(old, other)), Proxy(failures=(new,))).failures
    assert merged == (Failure("backend-refused", "a:1", 3, "new", 2.0), other)


def test_clients_that_wait_at_a_shared_socket_count_once() -> None:
    shared = [Listener("127.0.0.1:80", waiting, "rspd") for waiting in (3, 5, None)]
    proxy = merged_proxy(*(Proxy(listeners=(one, Listener("/run/a", None))) for one in shared))
    assert proxy.listeners == (Listener("127.0.0.1:80", 5, "rspd"), Listener("/run/a", None))


def test_clients_that_wait_at_sockets_that_share_a_port_are_added() -> None:
    proxy = merged_proxy(*(Proxy(listeners=(Listener("80", waiting),)) for waiting in (3, 5)))
    assert proxy.listeners == (Listener("80", 8),)


def test_a_proxy_is_full_in_as_many_processes_as_say_so() -> None:
    full, free = Proxy(open=1, most=1, full_in=1), Proxy(most=1)
    assert [merged_proxy(*them).full_in for them in ([full, free], [full, full], [free, free])] == [1, 2, 0]
    assert merged_proxy(free, full._replace(retired=True)).full_in == 0


def test_sockets_at_other_addresses_stay_apart() -> None:
    proxy = merged_proxy(Proxy(listeners=(Listener("1", 1),)), Proxy(listeners=(Listener("2", 2),)))
    assert proxy.listeners == (Listener("1", 1), Listener("2", 2))


def test_a_proxy_that_one_process_has_taken_out_is_that_of_the_other() -> None:
    proxy = merged_proxy(Proxy("web", retired=True, open=3, most=10), Proxy("web", open=1, most=5, idle=60.0))
    assert (proxy.retired, proxy.open, proxy.most, proxy.idle) == (False, 4, 5, 60.0)
    gone = merged_proxy(Proxy("web", retired=True, open=3, most=10), Proxy("web", retired=True, most=10))
    assert (gone.retired, gone.open, gone.most) == (True, 3, 20)


def test_proxies_routes_pools_and_backends_of_the_same_names_are_one_each() -> None:
    first = Snapshot(
        Process(),
        (Proxy("a"), Proxy("b")),
        (Route("a", "x", clients=1), Route("b", "x", clients=10)),
        (Pool("a", queue=1), Pool("", "p", True, queue=2)),
        (Backend("a", name="h:1", chosen=1), Backend("", "p", True, "h:1", chosen=2)),
    )
    second = Snapshot(
        Process(),
        (Proxy("b"), Proxy("c")),
        (Route("a", "x", clients=2),),
        (Pool("", "p", True, queue=5), Pool("a", "p", queue=7)),
        (Backend("", "p", True, "h:1", chosen=4), Backend("a", "p", name="h:1", chosen=8)),
    )
    merged = merge([first, second])
    assert [proxy.name for proxy in merged.proxies] == ["a", "b", "c"]
    assert [(one.proxy, one.name, one.clients) for one in merged.routes] == [("a", "x", 3), ("b", "x", 10)]
    assert [one.queue for one in merged.pools] == [1, 7, 7]
    assert [one.chosen for one in merged.backends] == [1, 6, 8]


def test_a_backend_is_in_the_worst_of_its_states_and_in_service_where_it_is() -> None:
    up = Backend(name="a:1", state="up", state_age=100.0, open=1, limit=5.0, chosen=10, failed=1)
    full = Backend(name="a:1", state="full", state_age=50.0, open=5, limit=5.0, chosen=20)
    down = Backend(name="a:1", state="down", state_age=9.0, why="refused", chosen=5, failed=4)
    trial = Backend(name="a:1", state="trial", state_age=1.0, why="timeout", limit=5.0)
    merged = merged_backend(up, full, trial)
    assert (merged.state, merged.state_age, merged.why) == ("trial", 1.0, "timeout")
    assert (merged.open, merged.limit, merged.chosen, merged.failed) == (6, 15.0, 30, 1)
    assert merged.in_service_in == 2
    assert merged_backend(up, full).state == "full"
    worst = merged_backend(trial, down)
    assert (worst.state, worst.state_age, worst.why, worst.in_service_in) == ("down", 9.0, "timeout", 0)
    assert worst.limit == inf


def test_a_state_of_a_later_version_is_no_trouble() -> None:
    assert merged_backend(Backend(state="resting"), Backend(state="up")).state == "up"


def test_checks_are_added_and_the_last_verdict_counts() -> None:
    bad = Checks(good=10, bad=2, ago=1.0, last_good=False, reason="status 500")
    good = Checks(good=20, bad=0, ago=3.0)
    assert merged_backend(Backend(checks=good), Backend(checks=bad)).checks == Checks(30, 2, 1.0, False, "status 500")
    assert merged_backend(Backend(checks=None), Backend(checks=good)).checks == good
    assert merged_backend(Backend(), Backend()).checks is None


def test_connect_times_of_other_bounds_are_left_out() -> None:
    times = [Distribution(), Distribution((1, 2), 1.0), Distribution((1, 2, 3), 9.0), Distribution((3, 0), 0.5)]
    assert merged_backend(*(Backend(connect=one) for one in times)).connect == Distribution((4, 2), 1.5)


def test_the_process_is_the_first_one_and_what_happened_to_any() -> None:
    first = Process("0.3.0", 10, now=5.0, age=7.0, service_age=8.0, reloads=1, handovers=2, descriptors=5)
    second = Process("0.3.0", 11, "2", now=6.0, age=9.0, service_age=70.0, failure="busy", reloads=3, reloads_failed=1)
    third = second._replace(unanswered=("/a", "/b"))
    merged = merged_process(first, second._replace(ending=True, unanswered=("/a",)), third)
    assert merged == Process(
        "0.3.0",
        10,
        now=6.0,
        age=7.0,
        service_age=70.0,
        processes=3,
        unanswered=("/a", "/b"),
        failure="busy",
        reloads=3,
        reloads_failed=1,
        handovers=2,
        ending=True,
        descriptors=5,
    )


def test_descriptors_are_those_of_the_process_that_is_nearest_to_its_limit() -> None:
    merged = merged_process(Process(descriptors=50, descriptors_max=1000), Process(descriptors=95, descriptors_max=100))
    assert (merged.descriptors, merged.descriptors_max) == (95, 100)


def test_turns_are_added() -> None:
    process = Process(turns=Distribution((1, 2, 3), 4.0))
    assert merged_process(process, process).turns == Distribution((2, 4, 6), 8.0)


def test_connections_are_sorted_again_and_cut_at_the_limit() -> None:
    parts = [
        Connections(Process(pid=1), 5, (Connection("a", idle=9.0), Connection("b", idle=3.0))),
        Connections(Process(pid=2), 2, (Connection("c", idle=5.0), Connection("d", idle=1.0))),
    ]
    merged = merge_connections(parts, Query(sort="idle", limit=3))
    assert [one.id for one in merged.connections] == ["a", "c", "b"]
    assert merged.matching == 7
    assert merged.process == Process(pid=1, processes=2)
    assert len(merge_connections(parts, Query()).connections) == 4
    assert merge_connections(parts, Query(limit=0)).connections == ()
