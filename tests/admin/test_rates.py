"""Rates by the difference of looks."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from rspd.admin.rates import Rates, Series
from rspd.snapshot import Backend, Distribution, Process, Proxy, Rate, Route, Snapshot, Volume

WEB, OTHER = "10.0.0.11:80", "10.0.0.12:80"


def moment(begun: int, *, lineage: str = "k1", connect: tuple[int, ...] = ()) -> Snapshot:
    """A lone proxy that got so many connections, and ten bytes from and a hundred to each client."""
    proxy = Proxy(accepted=begun, volumes=(Volume(WEB, 10 * begun, 100 * begun),))
    return Snapshot(
        Process(lineage=lineage),
        (proxy,),
        backends=(Backend(name=WEB, chosen=begun, connect=Distribution(connect, 0.0)),),
    )


def looked(moments: Iterable[tuple[float, Snapshot]]) -> Rates:
    rates = Rates()
    for when, snapshot in moments:
        rates.note(snapshot, when)
    return rates


def of_backend(rates: Rates, begun: int = 0) -> Series:
    return rates.of(moment(begun).backends[0])


def test_one_look_tells_no_rate() -> None:
    rates = looked([(100.0, moment(5))])
    assert of_backend(rates).rate() is None
    assert of_backend(rates).connections(4) == [None] * 4
    assert of_backend(Rates()).rate() is None
    assert of_backend(Rates()).begun == 0


def test_a_rate_is_that_of_the_last_three_seconds() -> None:
    # Nothing for ten seconds, then six connections a second.
    rates = looked((100.0 + second, moment(max(0, second - 10) * 6)) for second in range(16))
    assert of_backend(rates).rate() == Rate(6.0, 60.0, 600.0)
    assert rates.of(moment(0).proxies[0]).rate() == Rate(6.0, 60.0, 600.0)


def test_a_proxy_that_came_back_has_its_rate_while_connections_of_before_go_on() -> None:
    before = Proxy(retired=True, open=1)
    looks = [moment(6 * second) for second in range(6)]
    rates = looked((100.0 + at, look._replace(proxies=(*look.proxies, before))) for at, look in enumerate(looks))
    assert rates.of(moment(0).proxies[0]).rate() == Rate(6.0, 60.0, 600.0)


def test_looks_that_are_far_apart_tell_the_rate_between_them() -> None:
    rates = looked([(100.0, moment(0)), (130.0, moment(60))])
    assert of_backend(rates).rate() == Rate(2.0, 20.0, 200.0)


def test_the_last_minute_is_in_parts_of_the_same_length() -> None:
    # One a second in the first half, five a second in the second one.
    rates = looked((120.0 + second, moment(second + max(0, second - 30) * 4)) for second in range(61))
    assert of_backend(rates).connections(4) == pytest.approx([1.0, 1.0, 5.0, 5.0])
    assert of_backend(rates).begun == 180


def test_a_part_in_which_nobody_looked_is_not_known() -> None:
    rates = looked((160.0 + second, moment(3 * second)) for second in range(21))
    assert of_backend(rates).connections(4) == [None, None, pytest.approx(3.0), pytest.approx(3.0)]


def test_a_part_that_has_just_begun_is_as_what_was_before_it() -> None:
    rates = looked((165.001 + second, moment(7 * second)) for second in range(16))
    assert of_backend(rates).connections(4) == [None, None, pytest.approx(7.0), pytest.approx(7.0)]


def test_many_looks_a_second_are_as_few() -> None:
    rates = looked((100.0 + tenth / 10, moment(tenth)) for tenth in range(1000))
    series = of_backend(rates)
    assert len(series.times) < 160
    assert series.rate() == pytest.approx(Rate(10.0, 100.0, 1000.0))
    assert series.times[-1] - series.times[0] == pytest.approx(60, abs=1)


@pytest.mark.parametrize("later", [moment(3), moment(80, lineage="k2")], ids=["fewer", "another service"])
def test_counts_that_begin_anew_tell_nothing_of_before(later: Snapshot) -> None:
    rates = looked([(100.0, moment(50)), (101.0, moment(60)), (102.0, later)])
    assert of_backend(rates).rate() is None
    rates.note(later, 103.0)
    assert of_backend(rates).rate() == Rate(0.0, 0.0, 0.0)


def test_workers_that_fall_silent_are_no_rate() -> None:
    both, one = moment(100), moment(60)
    one = one._replace(process=one.process._replace(unanswered=("/run/rspd/worker-2.sock",)))
    rates = looked([(100.0, both), (101.0, one), (102.0, both)])
    assert of_backend(rates).rate() is None


def test_times_to_connect_are_those_of_the_last_minute() -> None:
    rates = looked([(100.0, moment(0, connect=(8, 2, 0))), (101.0, moment(0, connect=(8, 5, 1)))])
    assert of_backend(rates).connect().counts == (0, 3, 1)


def test_times_to_connect_are_those_of_all_if_nobody_connected() -> None:
    rates = looked([(100.0 + second, moment(0, connect=(8, 2, 0))) for second in range(3)])
    assert of_backend(rates).connect().counts == (8, 2, 0)


def test_the_bytes_of_a_shared_pool_are_those_of_all_its_proxies() -> None:
    def at(count: int) -> Snapshot:
        proxies = tuple(Proxy(name, volumes=(Volume(OTHER, count, 2 * count),)) for name in ("a", "b", "c"))
        routes = (Route("a", "one", pool="web", pool_shared=True), Route("b", "one", pool="web", pool_shared=True))
        backends = (Backend("", "web", True, OTHER), Backend("c", name=OTHER))
        return Snapshot(proxies=proxies, routes=routes, backends=backends)

    rates = looked([(100.0, at(0)), (102.0, at(10))])
    shared, own = at(0).backends
    assert rates.of(shared).rate() == Rate(0.0, 10.0, 20.0)
    assert rates.of(own).rate() == Rate(0.0, 5.0, 10.0)
