"""What `rspd top` draws, and what keys do, without a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf

import pytest

from rspd.admin.query import Query
from rspd.admin.rates import Rates
from rspd.commands.screen import Drawn, Seen, View, clean, draw, press
from rspd.commands.tables import BAD, spark
from rspd.snapshot import Backend, Connection, Connections, Distribution, Process, Proxy, Rate, Snapshot

PROCESS = Process("0.3.0", 4711, lineage="k1", age=60.0, service_age=277_000.0)


def service(backends: int, *, down: int = 0) -> Snapshot:
    """A proxy with so many backends, of which the last ones are down, the very last one for the shortest time."""
    names = [f"10.0.0.{number}:80" for number in range(backends)]
    made = [Backend("web", name=name, state_age=90_000.0, open=2, chosen=7) for name in names]
    for number in range(backends - down, backends):
        made[number] = made[number]._replace(state="down", why="no route to host", state_age=float(backends - number))
    proxy = Proxy("web", open=2 * backends, most=500, last_10s=Rate(12.0, 1e3, 1e6))
    return Snapshot(PROCESS, (proxy,), backends=tuple(made))


def opened(count: int) -> Connections:
    made = (
        Connection(f"k1-{n}", "web", f"192.0.2.{n}:4000", "", "10.0.0.1:80", age=n * 60.0, idle=float(n), sent=n * 1000)
        for n in range(count)
    )
    return Connections(PROCESS, count, tuple(made))


def drawn(snapshot: Snapshot, view: View = View(), height: int = 24, width: int = 80, **seen: object) -> Drawn:  # noqa: B008
    rates = Rates()
    rates.note(snapshot, 100.0)
    return draw(Seen(snapshot, **seen), rates, view, height, width)  # type: ignore[arg-type]


def texts(screen: Drawn) -> list[str]:
    return [line.text.rstrip() for line in screen.lines]


def test_the_first_line_tells_who_it_is_and_what_goes_on() -> None:
    assert texts(drawn(service(3)))[0] == "rspd 0.3.0  pid 4711  up 3 d 4 h  6 of 500 open  12 new/s  1 MB/s"


def test_a_backend_that_is_down_stands_before_the_others_and_says_why() -> None:
    screen = drawn(service(40, down=2), troubles=["web: 2 of 40 backends are down"])
    lines = texts(screen)
    assert "1 trouble" in lines[0]
    assert lines[1] == "! web: 2 of 40 backends are down"
    assert lines[4].split()[:4] == ["10.0.0.39:80", "2", "down", "1s"]
    assert lines[5].strip() == "no route to host"
    assert lines[6].split()[:4] == ["10.0.0.38:80", "2", "down", "2s"]
    assert {screen.lines[number].style for number in (1, 4, 5, 6, 7)} == {BAD}
    assert screen.lines[8].style != BAD


def test_a_backend_that_is_down_in_one_of_two_processes_says_so() -> None:
    snapshot = service(1, down=1)
    snapshot = snapshot._replace(process=PROCESS._replace(processes=2))
    assert "down in 1 of 2 processes: no route to host" in "\n".join(texts(drawn(snapshot)))


def test_a_proxy_that_was_taken_out_is_shown_until_its_last_connection_has_ended() -> None:
    snapshot = service(1)
    for count, shown in ((3, True), (0, False)):
        proxies = (*snapshot.proxies, Proxy("gone", retired=True, open=count))
        backends = (*snapshot.backends, Backend("gone", name="10.0.0.99:80"))
        text = "\n".join(texts(drawn(snapshot._replace(proxies=proxies, backends=backends))))
        assert ("gone" in text, "10.0.0.99:80" in text, "retired" in text) == (shown, shown, shown)


def test_numbers_that_are_not_known_are_shown_as_such() -> None:
    """Any time and any rate may be null in JSON."""
    rate = Rate(inf, inf, inf)
    snapshot = Snapshot(PROCESS._replace(service_age=inf), (Proxy("web", last_10s=rate, last_minute=rate),))
    connections = Connections(PROCESS, 1, (Connection("k1-1", rate=inf, age=inf, idle=inf),))
    assert "up -" in texts(drawn(snapshot, connections=connections))[0]


def test_more_troubles_than_fit_are_counted() -> None:
    lines = texts(drawn(service(1), troubles=[f"trouble {number}" for number in range(9)]))
    assert lines[1:5] == ["! trouble 0", "! trouble 1", "! trouble 2", "! 6 more: see rspd status"]


def test_both_parts_are_there_and_the_largest_can_be_chosen() -> None:
    lines = texts(drawn(service(60), connections=opened(60)))
    assert sum("10.0.0" in line and "192" not in line for line in lines) == 13
    assert sum("192.0.2." in line for line in lines) == 5
    lines = texts(drawn(service(60), View(swapped=True), connections=opened(60)))
    assert sum("10.0.0" in line and "192" not in line for line in lines) == 5
    assert sum("192.0.2." in line for line in lines) == 13


def test_a_part_that_needs_few_lines_leaves_them_to_the_other() -> None:
    lines = texts(drawn(service(2), connections=opened(60)))
    assert sum("192.0.2." in line for line in lines) == 16
    assert "60 connections, 16 shown, oldest first" in lines


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("help_shown", [False, True])
@pytest.mark.parametrize("typed", [None, "10.0.0.7"])
def test_it_fits_any_screen(swapped: bool, help_shown: bool, typed: str | None) -> None:
    seen = {"connections": opened(9), "troubles": ["a trouble of many words " * 9]}
    view = View(swapped=swapped, help=help_shown, typed=typed)
    for height in [*range(1, 10), 24]:
        for width in [*range(1, 9), 20, 37, 80, 300]:
            lines = drawn(service(9, down=3), view, height, width, **seen).lines
            assert len(lines) == height
            assert max(len(line.text) for line in lines) <= width


def test_without_anything_there_is_a_screen() -> None:
    assert texts(draw(Seen(), Rates(), View(), 24, 80))[0].startswith("rspd")


@pytest.mark.parametrize(
    ("width", "titles"),
    [
        (80, "PROXY, BACKEND OPEN STATE SHARE CONN/S BYTES/S P50 P99 MINUTE"),
        (60, "PROXY, BACKEND OPEN STATE CONN/S BYTES/S MINUTE"),
        (32, "PROXY, BACKEND OPEN STATE"),
    ],
)
def test_where_there_is_no_room_the_least_important_columns_go(width: int, titles: str) -> None:
    assert " ".join(texts(drawn(service(2), width=width))[1].split()) == titles


def test_where_there_is_room_connections_say_more() -> None:
    assert "k1-0" not in "\n".join(texts(drawn(service(1), width=70, connections=opened(1))))
    assert "k1-0" in "\n".join(texts(drawn(service(1), width=120, connections=opened(1))))


def test_a_backend_with_its_port_has_room_whoever_the_clients_are() -> None:
    them = [
        Connection("a", "web", "192.168.100.100:50000", "", f"127.100.100.1:1800{n}", state=state)
        for n, state in enumerate(["open", "half-closed", "first bytes"])
    ]
    lines = texts(drawn(service(1), connections=Connections(PROCESS, 3, tuple(them))))
    assert [line.split()[1] for line in lines if "192.168." in line] == [one.backend for one in them]
    assert "BYTES/S" in "\n".join(lines[-20:])


def test_a_full_backend_has_no_age_and_the_shortest_times_are_not_divided() -> None:
    snapshot = service(1)
    connect = Distribution((9, *[0] * 14))
    full = snapshot.backends[0]._replace(state="full", connect=connect)
    line = texts(drawn(snapshot._replace(backends=(full,))))[3]
    assert line.split()[:3] == ["10.0.0.0:80", "2", "full"]
    assert line.count("<0.5 ms") == 2
    assert "1d" not in line


def test_no_control_character_and_no_wide_one_reaches_the_terminal() -> None:
    evil = "a\x1b[2Jb\nc\x9bd\u202ee\u4e2df"
    snapshot = service(1)._replace(process=PROCESS._replace(version=evil))
    snapshot = snapshot._replace(backends=(Backend("web", name=evil, state="down", why=evil),))
    connection = Connection(evil, evil, evil, evil, evil, evil, evil, evil)
    lines = texts(
        drawn(snapshot, View(wanted=evil), 24, 300, troubles=[evil], connections=Connections(PROCESS, 1, (connection,)))
    )
    assert "\n".join(lines).count("a?[2Jb?c?d?e?f") >= 11
    assert all(line.isprintable() for line in lines)
    assert "a?[2Jb?c?d?e?f" in texts(drawn(snapshot, fault=evil))[0]


def test_a_terminal_without_utf_8_gets_ascii() -> None:
    snapshot = service(2, down=1)._replace(process=PROCESS._replace(version="0.3é"))
    lines = texts(drawn(snapshot, View(ascii=True), 24, 40, connections=opened(3), troubles=["ä" * 90]))
    assert all(line.isascii() for line in lines)
    assert clean("a…é", ascii_only=True) == "a~?"


def test_a_sparkline_has_its_highest_bar_at_the_highest_rate() -> None:
    assert spark([None, 0.0, 0.01, 4.0, 8.0], "01234567") == " 0147"
    assert spark([0.0, 0.0], "01234567") == "00"
    assert spark([0.1 + 0.2, 0.3], "01234567") == "77"


def test_without_an_answer_the_last_picture_stays() -> None:
    screen = drawn(service(2), connections=opened(2), fault="nobody listens there", ago=7.4)
    assert texts(screen)[0] == "NO ANSWER for 7 s: nobody listens there"
    assert "10.0.0.1:80" in "\n".join(texts(screen))
    assert "192.0.2.1:4000" in "\n".join(texts(screen))


def test_backends_scroll_to_their_end_and_no_further() -> None:
    view = press(View(), "KEY_END", 13)
    assert view
    screen = drawn(service(60), view, connections=opened(60))
    assert screen.first == 61 - screen.page
    assert "10.0.0.59:80" in "\n".join(texts(screen))
    assert f"{screen.first + 1}-61 of 61" in "\n".join(texts(screen))
    view = press(view._replace(first=screen.first), "KEY_PPAGE", screen.page)
    assert view
    assert view.first == screen.first - screen.page + 1
    view = press(view, "KEY_UP", screen.page)
    assert view
    assert drawn(service(60), view).first == screen.first - screen.page
    view = press(view, "KEY_HOME", screen.page)
    assert view
    assert drawn(service(60), view).first == 0


def typed(keys: Sequence[str], view: View = View()) -> View:  # noqa: B008
    for key in keys:
        pressed = press(view, key, 10)
        assert pressed, f"the end at {key!r}"
        view = pressed
    return view


def test_keys_sort_pause_and_swap() -> None:
    assert typed("b").sort == "bytes"
    assert typed("ba").sort == "age"
    assert typed("i").sort == "idle"
    assert typed("r").sort == "rate"
    assert typed("ps") == View(paused=True, swapped=True)
    assert typed("psps") == View()
    assert typed(["KEY_F(1)", "x"]) == View()
    assert typed("h").help
    assert not typed("hx").help
    assert press(View(), "q", 10) is None
    assert press(View(help=True), "q", 10) is None


def test_a_filter_is_typed_corrected_and_taken_back() -> None:
    assert typed("fquit").typed == "quit"
    assert typed(["f", *"qui", "KEY_BACKSPACE", "\n"]) == View(wanted="qu")
    assert typed(["f", "a", "\x1b"], View(wanted="b")) == View(wanted="b")
    assert typed(["f", "\x15", "\n"], View(wanted="b")) == View()
    assert typed(["f", "\x01", "é", "KEY_UP", "x"]).typed == "x"
    assert "cancel): x_" in texts(drawn(service(1), View(typed="x")))[-1]
    assert texts(drawn(service(1), View(typed="x"), width=8))[-1] == "only: x_"


def test_what_is_typed_is_part_of_a_name_or_a_network() -> None:
    assert View(wanted="192.0.2").query(24) == Query(text="192.0.2", limit=24)
    assert View(wanted="10.0.0.0/8").query(24) == Query(client="10.0.0.0/8", limit=24)
    for word in ("10.0.0.0/", "/run/app.sock", "web/x"):
        assert View(wanted=word).query(24) == Query(text=word, limit=24)
    assert "2 connections of web, oldest first" in texts(drawn(service(2), View(wanted="web"), connections=opened(2)))
