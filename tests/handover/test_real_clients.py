"""Clients as people use them, through twenty restarts: none of them learns of one."""

from __future__ import annotations

import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from tests.handover.clients import PORTS, SIZE, Download, mqtt, postgresql, psql, ssh, websocket
from tests.handover.programs import Program, check_programs, servers
from tests.handover.talks import fields
from tests.support import eventually
from tests.system.machine import Machine

RESTARTS = 20
INFO = 6

# How many connections each proxy has through all restarts.
LASTING = {"ssh": 1, "postgresql": 1, "websocket": 1, "mqtt": 2, "download": 1}
TOTAL = sum(LASTING.values())

# All words are of one transaction, in one process of the server.
OPEN = "CREATE TABLE words (number serial, word text); BEGIN;"
INSERT = "INSERT INTO words (word) VALUES ('{}') RETURNING pg_backend_pid(), txid_current(), word;"
SELECT = "SELECT string_agg(word, ' ' ORDER BY number) FROM words;"


class Talk(NamedTuple):
    """Who reads a word, within which line, and who says it then, at the end of which line."""

    speaker: Program
    line: str
    listener: Program
    answer: str


def configuration() -> str:
    """The file: a proxy for each server."""
    proxies = [
        f"  {name}: {{listen: '127.0.0.1:{listen}', backend: '127.0.0.1:{backend}', max_connections: 10}}"
        for name, (listen, backend) in PORTS.items()
    ]
    return "\n".join(["idle_timeout: off", "proxies:", *proxies]) + "\n"


class Clients:
    """All that talk, and what they have said up to now."""

    def __init__(self, talks: list[Talk]) -> None:
        self.talks = talks
        self.words: list[str] = []

    def talk(self) -> None:
        """Each sends a new word, and hears it again."""
        word = str(len(self.words))
        self.words.append(word)
        for talk in self.talks:
            talk.speaker.say(talk.line.format(word))
        for talk in self.talks:
            talk.listener.hear(talk.answer.format(word))


def restart(machine: Machine, clients: Clients) -> None:
    """Restart rspd, while the clients talk on."""
    before = machine.pid()
    command = machine.command("systemctl", "restart", "rspd")
    with subprocess.Popen(command, stdin=subprocess.DEVNULL) as restarting:
        while restarting.poll() is None:
            clients.talk()
    assert restarting.returncode == 0
    assert machine.pid() != before
    assert f"took over {TOTAL} connections" in machine.show("StatusText")


def test_twenty_restarts_keep_ssh_a_transaction_a_websocket_a_download_and_mqtt(
    machine: Machine, record_property: Callable[[str, object], None]
) -> None:
    check_programs()
    machine.write("/etc/rspd.yaml", configuration())
    machine.systemctl("start", "rspd")
    with servers() as there:
        session, database, socket = ssh(there), postgresql(there), websocket(there)
        broker, publisher, subscriber = mqtt(there)
        database.say(OPEN)
        clients = Clients(
            [
                Talk(session, "{}", session, r"^\d+ {}"),
                Talk(database, INSERT, database, r"\|{}"),
                Talk(socket, "{}", socket, "^{}"),
                Talk(publisher, "{}", subscriber, "^{}"),
            ]
        )
        clients.talk()
        began, moved = time.monotonic(), []
        with Download(1 / (RESTARTS + 1)) as download:
            for number in range(RESTARTS):
                clients.talk()
                before = eventually(lambda: download.received, "the download is under way")
                restart(machine, clients)
                after = download.received
                moved.append(after - before)
                assert after < SIZE
                download.allow((number + 2) / (RESTARTS + 1))
                eventually(lambda after=after: download.received > after, "it goes on")  # type: ignore[misc]
                clients.talk()
            seconds = time.monotonic() - began
            assert download.end() == "complete"

        session.say("end")
        check_count(session.end())
        check_transaction(database, clients.words)
        assert socket.end() == clients.words
        assert publisher.end() == []
        assert subscriber.end(signal.SIGINT) == clients.words
        came = [line.rpartition(" as ")[2].split()[0] for line in broker.lines if "New client connected" in line]
        assert sorted(came) == ["publisher", "subscriber"]
        check_log(machine, psql(there), clients.words)
    record_property(
        f"real clients on {machine.suite}",
        f"{RESTARTS} restarts in {seconds:.1f} s, {len(clients.words)} words each, {len(session.lines)} lines by ssh, "
        f"{min(moved) / 1e6:.0f} to {max(moved) / 1e6:.0f} MB downloaded during each",
    )


def check_count(lines: list[str]) -> None:
    """No line of the counter is missing, and they came in order."""
    assert [line.split()[0] for line in lines] == [str(number) for number in range(len(lines))]
    assert lines[-1].endswith(" end")


def check_transaction(database: Program, words: list[str]) -> None:
    """The transaction has all words, and commits."""
    for line in SELECT, "COMMIT;":
        database.say(line)
    *inserted, selected = database.end()
    assert len({line.rpartition("|")[0] for line in inserted}) == 1
    assert [line.rpartition("|")[2] for line in inserted] == words
    assert selected.split() == words


def check_log(machine: Machine, database: Program, words: list[str]) -> None:
    """The words are in the database for a new client. The log has one line for each connection, and no warning."""
    database.say(SELECT)
    assert [line.split() for line in database.end()] == [words]
    eventually(lambda: len(machine.log("^connection closed")) == TOTAL + 1, "all have ended")
    machine.systemctl("stop", "rspd")
    assert [entry["MESSAGE"] for entry in machine.entries() if int(entry["PRIORITY"]) < INFO] == []
    for begin in "handed over", "took over":
        assert [fields(line)["connections"] for line in machine.log(f"^{begin} ")] == [str(TOTAL)] * RESTARTS
    lines = [fields(line) for line in machine.log("^connection closed")]
    assert {line["cause"] for line in lines} <= {"client-closed", "backend-closed"}
    assert Counter((line["proxy"], line.get("handovers", "0")) for line in lines) == {
        ("postgresql", "0"): 1,
        **{(name, str(RESTARTS)): count for name, count in LASTING.items()},
    }
    assert [line["proxy"] for line in lines if int(line["received"]) > SIZE] == ["download"]
