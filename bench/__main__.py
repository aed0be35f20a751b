"""The command line, and the order of a run."""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from bench import ab, peers, report
from bench.peers import Peer
from bench.works import (
    BESIDE,
    BESIDE_DOWN,
    FOUR,
    GROUPS,
    HUNDRED,
    IDLE,
    OWN_RUN,
    PROCESSES,
    QUICK,
    RATE,
    SEVERAL,
    START,
    TURNS,
    WORKS,
    Results,
    Sizes,
    Work,
    at_rate,
    ground,
    rounds_told,
    run_beside,
    run_idle,
    run_start,
    run_turns,
    run_work,
    say,
    top_rate,
)

RESULTS = Path(__file__).parent / "results"
PAGE = peers.ROOT / "docs" / "speed.md"
DEBIAN_PYTHON = "/usr/bin/python3"  # what the package runs with


def refuse(why: str) -> NoReturn:
    """End, saying why and what to do."""
    sys.exit(f"bench: {why}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, and write results.json, results.md and the picture."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("bench: ended by SIGTERM"))
    if not options.report_only:
        try:
            measure(options)
        except KeyboardInterrupt:
            say("bench: ended by Ctrl-C; nothing written")
            sys.exit(130)
    made = report.write(options.output, options.picture)
    if options.publish:
        report.put_table(made, PAGE)
    written = [options.output / "results.md", options.output / "results.json", options.picture]
    say(f"written: {', '.join(map(str, written + [PAGE] * options.publish))}")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options. Ends the process if they are wrong."""
    names = ", ".join(peer.name for peer in peers.contestants(sys.executable, None))
    parser = argparse.ArgumentParser(prog="python -m bench", description="rspd and its peers, measured side by side.")
    parser.add_argument("--rounds", type=int, help=f"of each work; {Sizes.rounds} if not given")
    parser.add_argument("--quick", action="store_true", help="little of everything: shows that it works, not how fast")
    parser.add_argument("--only", metavar="WORK,...", help=f"some of {', '.join(GROUPS)}")
    parser.add_argument("--peers", metavar="NAME,...", help=f"some of {names}; rspd always takes part")
    which = f"{DEBIAN_PYTHON} if not given and it can run rspd, otherwise the one that runs this"
    parser.add_argument("--python", help=f"the interpreter of rspd and asyncio; {which}")
    parser.add_argument("--rspd", metavar="DIR", type=Path, help="another tree of rspd, as one more contestant")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--output", metavar="DIR", type=Path, help="where the results go; build/bench if not given")
    where.add_argument("--publish", action="store_true", help="into bench/results and docs/speed.md instead")
    parser.add_argument("--report-only", action="store_true", help="make the tables and the picture again")
    options = parser.parse_args(arguments)
    if options.output is None:
        options.output = RESULTS if options.publish else peers.ROOT / "build" / "bench"
    # What is published has its picture beside the page: the package installs docs/, and not bench/.
    options.picture = PAGE.with_suffix(".svg") if options.publish else options.output / "results.svg"
    parts = [name for name in ("quick", "peers", "rspd") if getattr(options, name)]
    if options.publish and parts:
        parser.error(f"--publish: expected a whole run, found --{parts[0]}; use --output")
    if options.publish and options.only and not (RESULTS / "results.json").exists():
        parser.error(f"--publish: expected {RESULTS}/results.json, to put a part into, found none; run without --only")
    chosen = options.python or usual_python()
    options.python = os.path.abspath(shutil.which(chosen) or chosen)  # contestants run in another folder
    options.groups = options.only.split(",") if options.only else list(GROUPS)
    if unknown := set(options.groups) - set(GROUPS):
        parser.error(f"--only: expected some of {', '.join(GROUPS)}, found {', '.join(sorted(unknown))}")
    if options.rounds is not None and options.rounds < 1:
        parser.error(f"--rounds: expected 1 or more, found {options.rounds}")
    if options.rspd and not (options.rspd / "rspd" / "__init__.py").exists():
        parser.error(f"--rspd: expected a folder that has rspd/__init__.py, found {options.rspd}")
    options.all = peers.contestants(options.python, options.rspd and options.rspd.resolve())
    known = [peer.name for peer in options.all]
    wanted = options.peers.split(",") if options.peers else known
    if unknown := set(wanted) - set(known):
        parser.error(f"--peers: expected some of {', '.join(known)}, found {', '.join(sorted(unknown))}")
    options.wanted = {*wanted, peers.RSPD, *([peers.OTHER] if options.rspd else [])}
    if options.report_only and not (options.output / "results.json").exists():
        parser.error(f"--report-only: expected {options.output}/results.json, found none; run without it first")
    return options


def usual_python() -> str:
    """Debian's interpreter if it can run rspd, otherwise the one that runs this."""
    return sys.executable if peers.Rspd(peers.RSPD, python=DEBIAN_PYTHON).missing() else DEBIAN_PYTHON


def check_output(folder: Path) -> None:
    """Make the folder of the results. Ends the process if they cannot be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        refuse(f"expected a folder for the results that can be written, found {folder}: {error.strerror}; use --output")


def check_descriptors(here: Sequence[Peer]) -> None:
    """Ends the process if a contestant needs more descriptors than the hard limit allows."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    greedy = max(here, key=lambda peer: peer.least)
    if greedy.least > hard:
        found = f"expected a hard limit of {greedy.least:,} descriptors or more, found {hard:,} (ulimit -Hn)"
        why = f"{greedy.name} needs them for {peers.CONNECTIONS:,} connections"
        refuse(f"{found}: {why}; raise it as root with ulimit -n {greedy.least}, or LimitNOFILE={greedy.least}")


def measure(options: argparse.Namespace) -> None:
    """Run all works, and write results.json."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        refuse("two processors are needed, one for the contestant and one for load and backend; this process has one")
    if not shutil.which("cc"):
        refuse("the load is a C program, and there is no compiler: apt install gcc libc6-dev")
    here: list[Peer] = []
    for peer in options.all:
        if peer.name not in options.wanted:
            continue
        if missing := peer.missing():
            if isinstance(peer, peers.Rspd):
                refuse(missing)
            say(f"bench: {missing}; going on without it")
        else:
            here.append(peer)
    check_descriptors(here)
    check_output(options.output)
    sizes = QUICK if options.quick else Sizes()
    sizes = replace(sizes, rounds=options.rounds or sizes.rounds)
    about = machine(here, options.python, options.quick)
    version = here[0].version()  # before the run: the tree may change meanwhile
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="rspd-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)  # nginx's worker is another user
        program = folder / "load"
        compiling = ["cc", "-O2", "-o", str(program), str(Path(__file__).with_name("load.c"))]
        compiled = subprocess.run(compiling, capture_output=True, text=True, check=False)
        if compiled.returncode:
            refuse(f"the load cannot be compiled; apt install gcc libc6-dev?\n{compiled.stderr}")
        found = run(options.groups, here, options.python, program, folder, sizes, cpus)
    about["minutes"] = round((time.monotonic() - began) / 60, 1)
    about["rounds"] = sizes.rounds
    if options.publish and options.only:
        whole = json.loads((options.output / "results.json").read_text())
        for key, results in found.items():
            measured = "Measured again, in" if key in whole["works"] else "Measured in"
            told = f"{about['date']}, {rounds_told(sizes.rounds)}, rspd {version}"
            results.notes.append(f"{measured} {OWN_RUN}{told}.")
        about, earlier = whole["about"], whole["works"]
    else:
        earlier = {}
    works = {**earlier, **{key: results.as_json() for key, results in found.items()}}
    (options.output / "results.json").write_text(json.dumps({"about": about, "works": works}, indent=1) + "\n")


def run(
    groups: Sequence[str],
    here: Sequence[Peer],
    python: str,
    program: Path,
    folder: Path,
    sizes: Sizes,
    cpus: Sequence[int],
) -> dict[str, Results]:
    """The works in their order, by key."""
    found: dict[str, Results] = {}
    proxies = [peer for peer in here if not isinstance(peer, peers.Direct)]
    os.sched_setaffinity(0, set(cpus[1:]))
    with ground(program, folder / "pinned", {cpus[0]}, set(cpus[1:]), sizes) as place:
        for work in WORKS:
            if work.group in groups and not work.processes:
                found[work.key] = run_work(work, taking_part(work, here, python), place)
                if work.key == HUNDRED:
                    found[work.key].notes.append(
                        f"Who has not {peers.MANY_BACKENDS} backends in its name has {peers.FEW_BACKENDS}."
                    )
                elif work.group == "balancing":
                    found[work.key].absent = [peer.name for peer in proxies if not peer.balances]
        if "requests" in groups:
            whose, rate = top_rate(found["requests-16"])
            work = at_rate(round(rate / 2, -2) or 100)
            found[RATE] = run_work(work, here, place)
            found[RATE].notes.append(f"Half of {whose}'s top rate in this run.")
            found[TURNS] = run_turns(work, peers.timed(here), place)
        if ab.GROUP in groups:
            found |= ab.run_ab(here, place)
        if IDLE in groups:
            found[IDLE] = run_idle(proxies, place, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
        if BESIDE in groups:
            few = {peers.RSPD, peers.OTHER, peers.NGINX, peers.HAPROXY, peers.DIRECT}
            those = [peer for peer in here if peer.name in few]
            for key in (BESIDE, BESIDE_DOWN):
                found[key] = run_beside(key, those, place)
        if START in groups:
            found[START] = run_start(proxies, place, python)
    if PROCESSES in groups:
        os.sched_setaffinity(0, set(cpus))
        with ground(program, folder / "all", set(cpus), set(cpus), sizes) as place:
            for work in WORKS:
                if work.processes:
                    found[work.key] = run_work(work, peers.in_processes(here, SEVERAL), place)
                    found[work.key].notes.append(
                        "*The most*, *the least*: what part of the new connections one process of rspd has accepted. "
                        f"Load and contestants share {len(cpus)} processors."
                    )
    return found


def taking_part(work: Work, here: Sequence[Peer], python: str) -> Sequence[Peer]:
    """Who does a work, of those who are here and rspd in serial mode."""
    if work.key == HUNDRED:
        return peers.few_and_many(here)
    if work.group == "balancing":
        return peers.balancing(here, FOUR)
    return [here[0], peers.serial(python), *here[1:]] if work.serial else here


def machine(here: Sequence[Peer], python: str, quick: bool) -> dict[str, object]:
    """What the figures were made on and with; nothing that names the host."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    system = platform.freedesktop_os_release()["PRETTY_NAME"]
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "cpu": model,
        "cpus": len(os.sched_getaffinity(0)),
        "virtual": "hypervisor" in Path("/proc/cpuinfo").read_text(),
        "kernel": platform.release().partition("-")[0],
        "system": system,
        "python": interpreter(python),
        "busy_before": round(busy(), 2),
        "quick": quick,
        "versions": {peer.name: peer.version() for peer in here if not isinstance(peer, peers.Direct)},
    }


def interpreter(python: str) -> str:
    """Its version, whose it is, and its path, within this tree if it is there."""
    command = [python, "-c", "import platform; print(platform.python_version())"]
    version = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    path = Path(python)
    debian = platform.freedesktop_os_release()["ID"] == "debian" and path.resolve().parent == Path("/usr/bin")
    shown = path.relative_to(peers.ROOT) if path.is_relative_to(peers.ROOT) else path
    return f"{version} ({'' if debian else 'not '}Debian's, {shown})"


def busy(seconds: float = 1.0) -> float:
    """How many processors had something to do, before there was anything of ours."""

    def used() -> int:
        fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
        return sum(map(int, fields)) - int(fields[3]) - int(fields[4])

    before = used()
    time.sleep(seconds)
    return (used() - before) / os.sysconf("SC_CLK_TCK") / seconds


if __name__ == "__main__":
    main()
