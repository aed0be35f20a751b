"""The process with backends behind a name, and a real name server that says what there is, and fails.

Each test runs in a namespace of its own, where the name server has port 53.
"""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.daemon.test_names import name_of, servers
from tests.fleet import File, enter, stays, talks
from tests.namespaces import in_namespace
from tests.peers.name_server import IMPATIENT, OWN_NAMES, PATIENT, NameServer, nsd
from tests.support import Backend, Daemon, eventually

UNKNOWN = '"Name or service not known"'
NO_ADDRESS = '"No address associated with hostname"'
NO_ANSWER = '"Temporary failure in name resolution"'


@dataclass
class Scene:
    """What a test has in its namespace. `web.test` stands for A at first. A, B and C have the same port.

    resolve: the key of the configuration.
    """

    folder: Path
    resolve: str
    names: NameServer
    a: Backend
    b: Backend
    c: Backend

    @contextmanager
    def rspd(self, **keys: Any) -> Iterator[tuple[Daemon, File]]:
        """rspd in front of `web.test`, looked up as often as it can be, with these keys."""
        defaults = {"backends": name_of(self.a), "resolve": self.resolve, "resolve_interval": "50ms"}
        file = File(self.folder, **{**defaults, **keys})
        with file.rspd() as daemon:
            try:
                yield daemon, file
            except BaseException:
                print(daemon.log, file=sys.stderr)
                raise


Scenario = Callable[[Scene], None]
SCENARIOS: dict[str, Scenario] = {}


def scenario(options: str = PATIENT) -> Callable[[Scenario], Callable[[Path, str], None]]:
    """Makes a test of what is to happen in the namespace. options: of the resolver there."""

    def make(function: Scenario) -> Callable[[Path, str], None]:
        @pytest.mark.parametrize("resolve", ["one", "each"])
        def test(tmp_path: Path, resolve: str) -> None:
            nsd()
            prepare = OWN_NAMES.replace("@OPTIONS@", options)
            in_namespace(play, function.__name__, str(tmp_path), resolve, prepare=prepare)

        SCENARIOS[function.__name__] = function
        test.__name__ = function.__name__
        return test

    return make


def play(name: str, folder: str, resolve: str) -> None:
    """Run in a namespace."""
    with NameServer(Path(folder), "127.0.0.11") as names, servers(*"ABC", handler=stays) as backends:
        SCENARIOS[name](Scene(Path(folder), resolve, names, *backends))


def served(daemon: Daemon) -> str:
    """By whom a client is served; empty if by nobody."""
    name, client = enter(daemon)
    client.close()
    return name


def served_by(daemon: Daemon) -> set[str]:
    """By whom some clients are served who come one after the other."""
    return {served(daemon) for _ in range(10)}


def failure(daemon: Daemon, number: int = 1) -> tuple[str, str, set[str]]:
    """Of the nth warning that the name is not found: the reason, what becomes of the addresses, and those."""
    line = daemon.wait_for("name not found", number)[number - 1]
    found = re.search(r'WARNING name not found name=web\.test reason=("[^"]*") (keeping|dropped)=(\S+)$', line)
    assert found, line
    return found[1], found[2], set(found[3].split(","))


# Answers that change


@scenario()
def test_when_a_name_changes_clients_go_to_its_new_address_and_open_connections_go_on(scene: Scene) -> None:
    with scene.rspd() as (daemon, _):
        name, client = enter(daemon)
        with client:
            assert name == "A"
            scene.names.says("127.0.0.12")
            (line,) = daemon.wait_for("name has changed")
            assert line.endswith(" INFO    name has changed name=web.test addresses=127.0.0.12")
            assert served_by(daemon) == {"B"}
            scene.names.says("127.0.0.12", "127.0.0.13")
            daemon.wait_for("name has changed", 2)
            assert served_by(daemon) <= {"B", "C"}
            assert talks(client)
        assert daemon.find("name not found") == []


# Answers that there is nothing


def vanishes(scene: Scene, vanish: Callable[[], None], reason: str) -> None:
    scene.names.says("127.0.0.11", "127.0.0.12")
    with scene.rspd() as (daemon, _):
        _, client = enter(daemon)
        with client:
            vanish()
            assert failure(daemon) == (reason, "dropped", {"127.0.0.11", "127.0.0.12"})
            assert served_by(daemon) == {""}
            assert {end["cause"] for end in daemon.wait_for_ends(10)} == {"backend-unknown"}
            assert talks(client)
            for _ in range(2):
                scene.names.answers_once_more()
            scene.names.says("127.0.0.13")
            (line,) = daemon.wait_for("name found again")
            assert line.endswith(" INFO    name found again name=web.test")
            assert served_by(daemon) == {"C"}
            assert len(daemon.find("name not found")) == 1
            vanish()
            assert failure(daemon, 2) == (reason, "dropped", {"127.0.0.13"})
            assert talks(client)
        taken_out = re.findall(r"backend taken out backend=(\S+):\d+ connections=", daemon.log)
        assert sorted(taken_out) == (["127.0.0.11", "127.0.0.12", "127.0.0.13"] if scene.resolve == "each" else [])
        assert len(daemon.find("name found again")) == 1


@scenario()
def test_clients_of_a_name_that_does_not_exist_are_turned_away_and_open_connections_go_on(scene: Scene) -> None:
    vanishes(scene, scene.names.says, UNKNOWN)


@scenario()
def test_clients_of_a_name_without_addresses_are_turned_away_and_open_connections_go_on(scene: Scene) -> None:
    vanishes(scene, scene.names.says_that_it_has_no_address, NO_ADDRESS)


@scenario()
def test_clients_wait_for_a_name_that_has_vanished_and_are_served_when_it_is_back(scene: Scene) -> None:
    with scene.rspd(queue_timeout="20s") as (daemon, _), ExitStack() as stack:
        assert served(daemon) == "A"
        scene.names.says()
        failure(daemon)
        clients = [stack.enter_context(daemon.connect()) for _ in range(10)]
        scene.names.answers_once_more()
        assert len(daemon.find("connection closed")) == 1
        scene.names.says("127.0.0.12")
        assert [client.recv(1) for client in clients] == [b"B"] * 10


@scenario()
def test_when_a_name_has_vanished_all_clients_go_to_the_other_backend(scene: Scene) -> None:
    with scene.rspd(backends=[name_of(scene.a), scene.b.address]) as (daemon, _):
        eventually(lambda: served_by(daemon) == {"A", "B"})  # clients go to B while the name is looked up
        scene.names.says()
        failure(daemon)
        assert served_by(daemon) == {"B"}
        scene.names.says("127.0.0.13")
        daemon.wait_for("name found again")
        assert served_by(daemon) == {"B", "C"}
        assert {end["cause"] for end in daemon.wait_for_ends(30)} == {"client-closed"}


@scenario()
def test_a_name_with_two_ports_vanishes_once(scene: Scene) -> None:
    with Backend(stays("D"), host="127.0.0.11") as other:
        with scene.rspd(backends=[name_of(scene.a), name_of(other)]) as (daemon, _):
            assert served_by(daemon) == {"A", "D"}
            scene.names.says()
            assert failure(daemon) == (UNKNOWN, "dropped", {"127.0.0.11"})
            assert served_by(daemon) == {""}
            scene.names.says("127.0.0.11")
            daemon.wait_for("name found again")
            assert served_by(daemon) == {"A", "D"}
            assert len(daemon.find("name not found")) == len(daemon.find("name found again")) == 1


@scenario()
def test_one_answer_that_a_name_does_not_exist_takes_nothing_away(scene: Scene) -> None:
    with scene.rspd() as (daemon, _):
        assert served(daemon) == "A"
        for number, more in enumerate(("127.0.0.12", "127.0.0.13"), 1):
            # rspd stands still but for one question, so that this answer reaches it and no second one.
            daemon.signal(signal.SIGSTOP)
            scene.names.says()
            scene.names.is_silent()
            daemon.signal(signal.SIGCONT)
            eventually(scene.names.waiting)
            daemon.signal(signal.SIGSTOP)
            scene.names.speaks()
            scene.names.says("127.0.0.11", more)
            daemon.signal(signal.SIGCONT)
            daemon.wait_for("name has changed", number)
        assert served_by(daemon) <= {"A", "C"}
        assert daemon.find("name not found|name found again") == []


# No answers


def fails(scene: Scene, daemon: Daemon, again: Callable[[], object]) -> None:
    """The name server fails from now on. again: waits until one more lookup has failed."""
    assert failure(daemon) == (NO_ANSWER, "keeping", {"127.0.0.11"})
    for _ in range(3):
        again()
        assert served_by(daemon) == {"A"}


@scenario()
def test_while_the_name_server_fails_clients_are_served_as_before(scene: Scene) -> None:
    with scene.rspd() as (daemon, _):
        assert served(daemon) == "A"
        scene.names.fails()
        fails(scene, daemon, scene.names.answers_once_more)
        scene.names.says("127.0.0.12")
        daemon.wait_for("name found again")
        daemon.wait_for("name has changed")
        assert served_by(daemon) == {"B"}
        assert len(daemon.find("name not found")) == 1


@scenario(IMPATIENT)
def test_while_the_name_server_is_silent_clients_are_served_as_before(scene: Scene) -> None:
    def again() -> None:
        before = scene.names.waiting()
        eventually(lambda: scene.names.waiting() > before)

    with scene.rspd() as (daemon, _):
        assert served(daemon) == "A"
        scene.names.is_silent()
        fails(scene, daemon, again)
        scene.names.speaks()
        daemon.wait_for("name found again")
        assert served_by(daemon) == {"A"}
        assert len(daemon.find("name not found")) == 1
        assert daemon.find("name has changed") == []


@scenario()
def test_a_failure_before_and_after_a_name_vanishes_changes_nothing_of_that(scene: Scene) -> None:
    with scene.rspd() as (daemon, file):
        assert served(daemon) == "A"
        scene.names.fails()
        assert failure(daemon) == (NO_ANSWER, "keeping", {"127.0.0.11"})
        scene.names.says()
        assert failure(daemon, 2) == (UNKNOWN, "dropped", {"127.0.0.11"})
        scene.names.fails()
        for _ in range(3):
            scene.names.answers_once_more()
            assert served_by(daemon) == {""}
        file.reload(daemon, backends=f"web.test:{scene.a.port + 1}")
        file.reload(daemon, backends=name_of(scene.a))
        assert served_by(daemon) == {""}
        scene.names.says("127.0.0.11")
        daemon.wait_for("name found again")
        assert served_by(daemon) == {"A"}
        assert len(daemon.find("name not found")) == 2


def moves_to_another_port(scene: Scene, fail: Callable[[], None]) -> None:
    with Backend(stays("D"), host="127.0.0.11") as other, scene.rspd() as (daemon, file):
        assert served(daemon) == "A"
        fail()
        # Then rspd's resolver has no answer either that it would use again.
        assert failure(daemon) == (NO_ANSWER, "keeping", {"127.0.0.11"})
        file.reload(daemon, backends=name_of(other))
        assert served_by(daemon) == {"D"}
        assert len(daemon.find("name not found")) == 1


@scenario()
def test_a_reload_with_another_port_keeps_the_addresses_while_the_name_server_fails(scene: Scene) -> None:
    moves_to_another_port(scene, scene.names.fails)


@scenario(IMPATIENT)
def test_a_reload_with_another_port_keeps_the_addresses_while_the_name_server_is_silent(scene: Scene) -> None:
    moves_to_another_port(scene, scene.names.is_silent)
