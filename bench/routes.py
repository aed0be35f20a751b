"""What a route costs, by server name or by Host, beside none: `make bench-routes`. See bench/README.md."""

from __future__ import annotations

import argparse
import json
import os
import signal
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from bench import counters, peers, report
from bench.__main__ import check_descriptors, check_output, machine, refuse, usual_python
from bench.peers import HAPROXY, NGINX, OTHER, RSPD, HAProxy, Nginx, Peer, PeerError, Place, Rspd, Running
from bench.works import MANY, Figures, Ground, Results, Sizes, ground, run, say

NAME = "mail.example.org"  # what all clients want
SNI, HOST, PREREAD, REQ_SNI = "SNI route", "Host route", "ssl_preread", "req.ssl_sni"
MOST = 1.25  # times a plain connection of rspd's
ROUNDS, COUNT = 20, 400  # connections of each contestant in a round


def hello() -> bytes:
    """The ClientHello of OpenSSL, for NAME."""
    sent = ssl.MemoryBIO()
    context = ssl.create_default_context()
    context.set_alpn_protocols(["h2", "http/1.1"])
    try:
        context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=NAME).do_handshake()
    except ssl.SSLWantReadError:
        pass
    return sent.read()


def request(size: int) -> bytes:
    """A GET request for NAME with the fields of a browser, of so many bytes."""
    lines = (
        *("GET /index.html HTTP/1.1", f"Host: {NAME}", "User-Agent: Mozilla/5.0 (X11; Linux x86_64) Gecko/20100101"),
        *("Accept: text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", "Accept-Language: en-US,en;q=0.5"),
        *("Accept-Encoding: gzip, deflate", "Connection: keep-alive", "Cookie: session="),
    )
    text = "\r\n".join(lines).encode()
    assert len(text) + 4 <= size, f"{len(text)} bytes do not fit into {size}"
    return text.ljust(size - 4, b"x") + b"\r\n\r\n"


# Who has routes has two backends: the one that NAME leads to, and one for all others.


@dataclass(frozen=True)
class RoutedRspd(Rspd):
    """rspd with routes by server name, or by Host."""

    key: str = "server_name"

    def command(self, place: Place) -> list[str]:
        """As for rspd otherwise."""
        config = fill(place, "routes.yaml", KEY=self.key, CONNECTIONS=self.connections)
        return [self.python, "-m", "rspd", "--foreground", "-c", config]


class RoutedNginx(Nginx):
    """nginx with ssl_preread."""

    def command(self, place: Place) -> list[str]:
        """As for nginx otherwise."""
        module = f"load_module {self.MODULE};" if self.MODULE.exists() else ""
        return [self.path or "", "-c", fill(place, "routes-nginx.conf", MODULE=module), "-e", "stderr"]


class RoutedHAProxy(HAProxy):
    """HAProxy with req.ssl_sni."""

    def command(self, place: Place) -> list[str]:
        """As for HAProxy otherwise."""
        return [self.path or "", "-db", "-f", fill(place, "routes-haproxy.cfg")]


def fill(place: Place, template: str, **values: object) -> str:
    """Fill in the settings of a contestant with routes."""
    wanted, other = place.backends
    return place.settings(template, WANTED=wanted, OTHER=other, **values)


def contestants(python: str, tree: Path | None) -> list[Peer]:
    """Each without routes, and with them."""
    said = hello()
    found: list[Peer] = []
    for plain in peers.contestants(python, tree):
        plain = replace(plain, question=said)
        if isinstance(plain, Rspd):
            sni = RoutedRspd(f"{plain.name}, {SNI}", tree=plain.tree, python=python, backends=2, question=said)
            host = replace(sni, name=f"{plain.name}, {HOST}", question=request(len(said)), key="host")
            found += [plain, sni, host]
        elif isinstance(plain, (Nginx, HAProxy)):
            kind, how = (RoutedNginx, PREREAD) if isinstance(plain, Nginx) else (RoutedHAProxy, REQ_SNI)
            fields = {**vars(plain), "name": f"{plain.name}, {how}", "backends": 2}
            found += [plain, kind(**fields)]
    return found


def run_routes(at_a_time: int, here: Sequence[Peer], place: Ground, rounds: int, count: int) -> Results:
    """New connections that say first what they want.

    cpu: CPU seconds of the contestant for a connection.
    """

    def measure(one: Running, share: float) -> Figures:
        asked = place.new_folder()
        asked.write_bytes(one.peer.question)
        number = max(at_a_time, int(count * share))
        earlier = place.accepted(one.backends)
        before = counters.settled(one.cpu)
        found = place.load("connections", one.port, number, at_a_time, asked)
        used = counters.settled(one.cpu) - before
        one.check()
        accepted = [now - then for then, now in zip(earlier, place.accepted(one.backends), strict=True)]
        if accepted != [number, *[0] * (len(accepted) - 1)]:
            raise PeerError(
                f"expected {number} connections to the backend of {NAME} and none elsewhere, got {accepted}"
            )
        return {"cpu": used / number, "rate": number / found["seconds"]}

    return run(Results(f"{at_a_time} at a time", "connection"), here, place, False, measure, rounds)


def ratios(results: Results, name: str, other: str) -> list[float]:
    """CPU time of a contestant ÷ that of another one, for each round; empty if one of them has none."""
    pairs = zip(results.rounds.get(name, ()), results.rounds.get(other, ()), strict=False)
    return [one["cpu"] / its["cpu"] for one, its in pairs]


def spread(values: Sequence[float]) -> str:
    """Their median, with the quartiles in brackets; empty if there are none."""
    if not values:
        return ""
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return f"{median(ordered):.2f} ({low:.2f} to {high:.2f})"


def plain_name(name: str) -> str:
    """The contestant without routes."""
    for how in (SNI, HOST, PREREAD, REQ_SNI):
        name = name.removesuffix(f", {how}")
    return name


def table(results: Results) -> list[str]:
    """One work: a row for each contestant."""
    lines = [
        f"New connections, {results.title}:\n",
        "| contestant | CPU µs | ÷ the same without routes | ÷ rspd without routes | rspd's SNI route ÷ it |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, rounds in results.rounds.items():
        cpu = f"{1e6 * median(one['cpu'] for one in rounds):.1f}"
        plain = plain_name(name)
        cells = [
            spread(ratios(results, name, plain)) if plain != name else "",
            spread(ratios(results, name, RSPD)) if name != RSPD else "",
            spread(ratios(results, f"{RSPD}, {SNI}", name)) if plain not in (RSPD, OTHER) else "",
        ]
        lines.append(f"| {name} | {cpu} | {' | '.join(cells)} |")
    lines += [f"| {name} | failed: {why} | | | |" for name, why in results.failed.items()]
    return [*lines, ""]


def targets(results: Results) -> list[str]:
    """Whether rspd reaches what it is to reach."""
    lines = []
    for how in (SNI, HOST):
        if found := ratios(results, f"{RSPD}, {how}", RSPD):
            verdict = "reached" if median(found) <= MOST else "**not reached**"
            times = f"{median(found):.2f} of {MOST} times a plain connection"
            lines.append(f"- {how}, {results.title}: {times}, {verdict}")
    return lines


def text(about: dict[str, Any], works: Sequence[Results]) -> str:
    """The tables, and what they were made with."""
    lines = [line for results in works for line in table(results)]
    lines += ["Targets:\n", *(line for results in works for line in targets(results)), ""]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    each = f"Figures are medians of {about['rounds']} rounds with {about['count']} connections each."
    shown = "A ratio is made for each round; in brackets are the quartiles of the rounds."
    busy = f"In the second before, other programs kept {about['busy_before']:.1f} CPUs busy."
    lines.append(f"{each} {shown} Measured {about['date']} on {report.describe(about)} {busy} Versions: {versions}.")
    return "\n".join([*lines, ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write routes.json and routes.md."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: ended by SIGTERM"))
    if not options.report_only:
        try:
            measure_all(options)
        except KeyboardInterrupt:
            say("bench: ended by Ctrl-C; nothing written")
            sys.exit(130)
    raw = json.loads((options.output / "routes.json").read_text())
    made = text(raw["about"], [Results(**one) for one in raw["works"]])
    (options.output / "routes.md").write_text(f"# What a route costs\n\n{made}")
    print(made, end="")
    say(f"written: {options.output / 'routes.md'}, {options.output / 'routes.json'}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Ends the process if they are wrong."""
    parser = argparse.ArgumentParser(prog="python -m bench.routes", description="What a route costs, side by side.")
    parser.add_argument("--quick", action="store_true", help="two rounds: shows that it works, not how fast")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"{ROUNDS} if not given")
    parser.add_argument("--only-rspd", action="store_true", help="without nginx and HAProxy")
    parser.add_argument("--python", help="the interpreter of rspd; as for python -m bench if not given")
    parser.add_argument("--rspd", metavar="DIR", type=Path, help="another tree of rspd, as one more contestant")
    default = peers.ROOT / "build" / "bench"
    parser.add_argument("--output", metavar="DIR", type=Path, default=default, help="build/bench if not given")
    parser.add_argument("--report-only", action="store_true", help="make the tables again")
    options = parser.parse_args(arguments)
    options.rounds = 2 if options.quick else options.rounds
    if options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, found {options.rounds}")
    if options.rspd and not (options.rspd / "rspd" / "__init__.py").exists():
        parser.error(f"--rspd: expected a folder that has rspd/__init__.py, found {options.rspd}")
    if options.report_only and not (options.output / "routes.json").exists():
        parser.error(f"--report-only: expected {options.output}/routes.json, found none; run without it first")
    return options


def measure_all(options: argparse.Namespace) -> None:
    """One connection at a time, and many, into routes.json."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        refuse("two processors are needed, one for the contestant and one for load and backend; this process has one")
    check_output(options.output)
    python = options.python or usual_python()
    here = contestants(python, options.rspd and options.rspd.resolve())
    if options.only_rspd:
        here = [peer for peer in here if isinstance(peer, Rspd)]
    for missing in dict.fromkeys(filter(None, (peer.missing() for peer in here))):
        say(f"bench: {missing}; going on without it")
    here = [peer for peer in here if not peer.missing()]
    check_descriptors(here)
    plain = [peer for peer in here if peer.name in (RSPD, OTHER, NGINX, HAPROXY)]
    about = machine(plain, python, options.quick)
    began = time.monotonic()
    os.sched_setaffinity(0, set(cpus[1:]))
    with tempfile.TemporaryDirectory(prefix="rspd-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # nginx's worker is another user
        program = folder / "load"
        source = str(Path(__file__).with_name("load.c"))
        compiled = subprocess.run(
            ["cc", "-O2", "-o", str(program), source], capture_output=True, text=True, check=False
        )
        if compiled.returncode:
            refuse(f"the load cannot be compiled; apt install gcc libc6-dev?\n{compiled.stderr}")
        works = []
        for at_a_time in (MANY, 1):
            own = folder / str(at_a_time)
            own.mkdir()
            size = len(here[0].question)
            with ground(program, own, {cpus[0]}, set(cpus[1:]), Sizes(), size) as place:
                works.append(run_routes(at_a_time, here, place, options.rounds, COUNT))
    about |= {"minutes": round((time.monotonic() - began) / 60, 1), "rounds": options.rounds, "count": COUNT}
    written = {"about": about, "works": [one.as_json() for one in works]}
    (options.output / "routes.json").write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
