"""Twenty restarts, with connections in every state: nobody is refused, nobody is cut, and nothing is wrong."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable

from tests.handover.talks import CONTROL, stored
from tests.handover.traffic import SETTLED, Peers, Traffic, configuration, held_back, log_of, small_buffers
from tests.support import eventually
from tests.system.machine import Machine

COUNTS = {
    "plain": 500,
    "splice": 200,
    "held": 200,
    "half": 150,
    "half-idle": 150,
    "idle": 250,
    "queued": 200,
    "dialling": 50,
    "dialling-late": 50,
    "proxied": 100,
    "aborting": 50,
    "retired": 50,
    "moved": 50,
}
RESTARTS = 20
AT_ONCE = 50  # connections of the backend that has a queue
LEAVE = 6  # of them end before each restart: so many enter
GO_ON = 4  # PROXY headers are sent to their end before each restart

# What happens before which restart; the last ones see what has become of it.
RELOADS, ROOM, ROOM_LATE = 3, 10, 18

PLACES = {**COUNTS, "short": 2000}
KEYS: dict[str, dict[str, object]] = {
    "queued": {"backend": {"address": "127.0.0.1:8013", "max_connections": AT_ONCE}, "queue_timeout": "10m"},
    "dialling": {"connect_timeout": "10m"},
    "dialling-late": {"connect_timeout": "10m"},
    "proxied": {"accept_proxy": "127.0.0.0/8", "accept_proxy_timeout": "10m"},
}

NEW = 500  # connections that are begun each second


def test_twenty_restarts_with_connections_in_every_state_refuse_nobody_and_lose_nothing(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    assert sum(COUNTS.values()) == 2000
    small_buffers(machine)
    machine.shell("echo 10000 60999 > /proc/sys/net/ipv4/ip_local_port_range")
    machine.drop_in("rspd.service", "[Service]\nLogRateLimitIntervalSec=0")
    machine.write("/etc/rspd.yaml", configuration(PLACES, keys=KEYS))
    machine.systemctl("start", "rspd")
    began = time.monotonic()
    root = f"/proc/{machine.leader}/root"
    with Traffic(COUNTS, root, period=1.0) as traffic, Peers("arrivals", 1 / NEW) as arrivals:
        traffic.listen(also=["short"], full=["dialling", "dialling-late"])
        traffic.mark()
        traffic.open()
        eventually(lambda: machine.show("StatusText").startswith("2000 served; "), "all are accepted", SETTLED)
        eventually(lambda: all_are_full(machine), "readers rest, and rspd holds bytes for nearly all", SETTLED)
        traffic.clients.tell("abort", name="aborting")
        assert traffic.clients.tell("reached")["queued"] == AT_ONCE
        traffic.move()
        arrivals.tell("start", place=8089)
        started = time.monotonic()
        seconds: list[float] = []
        left = gone_on = 0
        for number in range(RESTARTS):
            if number == RELOADS:
                machine.write("/etc/rspd.yaml", without_some())
                machine.systemctl("reload", "rspd")
                eventually(lambda: stored(machine) == CONTROL + len(PLACES) - 1, "a proxy was taken out")
            if number == ROOM:
                traffic.backends.tell("make_room", place=8014)
            if number == ROOM_LATE:
                traffic.backends.tell("make_room", place=8015)
            left += traffic.clients.tell("end", name="queued", count=LEAVE)
            gone_on += traffic.clients.tell("go_on", name="proxied", count=GO_ON)
            traffic.mark()
            before, at = machine.pid(), time.monotonic()
            machine.systemctl("restart", "rspd")
            seconds.append(time.monotonic() - at)
            assert machine.pid() != before
            assert traffic.lost() == []
            traffic.move()
            eventually(lambda: stored(machine) <= CONTROL + len(PLACES), "the store has the listeners alone")
            reached = {"queued": AT_ONCE + left, "proxied": gone_on}
            eventually(lambda: reached.items() <= traffic.clients.tell("reached").items(), "waiting ends")  # noqa: B023
            assert number >= ROOM_LATE or "dialling-late" not in traffic.clients.tell("reached")

        arrivals.tell("stop")
        lasted = time.monotonic() - started
        eventually(lambda: not arrivals.tell("state")["open"], "all short connections end", SETTLED)
        came = arrivals.tell("state")
        for name in ("dialling", "dialling-late"):
            count = COUNTS[name]
            eventually(lambda: traffic.clients.tell("reached").get(name) == count, name, SETTLED)  # noqa: B023
        traffic.clients.tell("go_on", name="proxied", count=COUNTS["proxied"])
        ended = traffic.finish()
        order = traffic.backends.tell("order", name="queued")
        backends = traffic.backends.tell("state")["short"]
    short = came["ends"].get("ok", 0)
    record_property(
        f"all states on {machine.suite}",
        f"{RESTARTS} restarts in {lasted:.0f} s, each took {min(seconds):.2f} to {max(seconds):.2f} s; {came['ends']} "
        f"new connections, {short / lasted:.0f} a second, the slowest took {came['slowest']:.2f} s; {left} left the "
        f"queue meanwhile; backends: {backends}; all of it took {time.monotonic() - began:.0f} s",
    )
    assert came["ends"].keys() == {"ok"}
    assert short > NEW * lasted / 2, "they came as fast as they should, or half of them on a busy host"
    assert order == sorted(order), "the queue was not in order"
    lines, taken = log_of(machine, RESTARTS, 1, ended, short)
    assert [count for count in taken if count < sum(COUNTS.values()) - left] == []
    assert {line["cause"] for line in lines if line["proxy"] == "aborting"} == {"client-aborted"}
    assert {line["cause"] for line in lines if line["proxy"] != "aborting"} == {"client-closed"}
    fewer = Counter(line["proxy"] for line in lines if line.get("handovers") != str(RESTARTS))
    assert fewer == {"queued": left}
    assert {line["via"] for line in lines if line["proxy"] == "proxied"} == {
        line["client"] for line in lines if line["proxy"] == "proxied"
    }


def without_some() -> str:
    """The file without a proxy, and with another backend in place of one; both have connections."""
    places = {name: count for name, count in PLACES.items() if name != "retired"}
    return configuration(places, keys={**KEYS, "moved": {"backend": "127.0.0.1:8019"}})


def all_are_full(machine: Machine) -> bool:
    """Whether nearly all connections of each kind with a slow reader are full."""
    full = held_back(machine)
    return all(full[kind] > 0.9 * COUNTS[kind] for kind in ("splice", "held", "aborting"))
