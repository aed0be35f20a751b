"""What README.md, docs/ and CONTRIBUTING.md say is true of this version, and stands there once."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import pytest

from rspd import __version__
from rspd.cli import main
from rspd.config.keys import GENERAL_KEYS, PROXY_KEYS, load_config
from rspd.config.pools import HEALTH_KEYS
from rspd.explaining.dump import dump
from rspd.settings import BackendConfig, HealthConfig, ProxyConfig
from tests.test_documentation import MAN_PAGES, ROOT, SHIPPED, options

README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
DOCUMENTS = {"README.md": README, "CONTRIBUTING.md": CONTRIBUTING, **PAGES}
MAKEFILE = (ROOT / "Makefile").read_text()
CODE = "".join(path.read_text() for path in sorted((ROOT / "rspd").rglob("*.py")))

FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(text: str, kind: str = "") -> list[str]:
    """What stands between fences, of this kind."""
    return [content for found, content in FENCED.findall(text) if found == kind]


def test_the_readme_has_at_most_10_kb_and_its_parts_in_order() -> None:
    assert 8_000 <= len(README.encode()) <= 10_000
    assert re.findall("^## (.*)$", README, re.MULTILINE) == [
        "What rspd does that others do not",
        "Try it",
        "Install",
        "The first file",
        "Three commands",
        "See what it does",
        "It hangs, it is refused: where to look",
        "Further reading",
    ]


# What is shown


EXAMPLES = {f"{name} {n}": text for name, page in DOCUMENTS.items() for n, text in enumerate(blocks(page, "yaml"))}


@pytest.mark.parametrize("text", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_the_examples_are_valid_and_a_check_of_all_prints_the_same(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rspd.yaml"
    file.write_text(text)
    config = load_config(str(file), {})
    file.write_text(dump(config))
    assert load_config(str(file), {}) == config


def test_the_readme_shows_what_a_check_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (first,) = (text for text in EXAMPLES.values() if "health: {http: /}" in text and "pools" not in text)
    (shown,) = (text for text in blocks(README) if text.startswith("$ rspd --check\n"))
    Path("rspd.yaml").write_text(first)
    monkeypatch.setattr("rspd.cli.DEFAULT_FILE", "rspd.yaml")
    assert main(["--check"]) == 0
    assert f"$ rspd --check\n/etc/{capsys.readouterr().out}" == shown


def test_the_readme_shows_what_is_said_of_a_broken_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (shown,) = (text for text in blocks(README) if text.startswith("$ cat new.yaml\n"))
    content, said = shown.removeprefix("$ cat new.yaml\n").split("$ rspd --check -c new.yaml\n")
    Path("new.yaml").write_text(content)
    assert main(["--check", "-c", "new.yaml"]) == 78
    assert capsys.readouterr() == ("", said)


def test_what_is_shown_of_the_log_is_what_the_code_writes() -> None:
    line = re.compile(
        r"^(?:\w+ \d+ [\d:]+ vm rspd\[\d+\]: |[\d-]+ [\d:.]+ [A-Z]+ +|)([a-z][a-z, ]+[a-z])(?: \w+=.*)$", re.M
    )
    shown = [text for page in DOCUMENTS.values() for block in blocks(page) for text in line.findall(block)]
    assert len(shown) > 10
    assert [text for text in shown if text not in CODE] == []


def test_a_connections_line_has_the_fields_that_are_shown() -> None:
    shown = [text for page in DOCUMENTS.values() for text in re.findall("connection closed (.*)", page)]
    fields = {tuple(re.findall(r"(?:^| )(\w+)=", text)) for text in shown}
    usual = ("client", "backend", "sent", "received", "seconds", "cause")
    routed = ("client", "route", "name", "protocol", *usual[1:])
    assert fields == {usual, (*usual, "handovers"), (*usual, "reason"), routed, ("client", *routed[2:])}


def test_the_try_is_at_the_ports_of_make_run_which_the_installed_service_does_not_use() -> None:
    ports = re.findall(r"^(?:BACKEND_)?PORT \?= (\d+)$", MAKEFILE, re.MULTILINE)
    (shown,) = (text for text in blocks(README) if text.startswith("$ make run\n"))
    assert f"Open http://127.0.0.1:{ports[0]}/ (Ctrl-C ends it)\n" in shown
    assert f"backend=127.0.0.1:{ports[1]} " in shown
    proxy = load_config(str(SHIPPED), {}).proxies[0]
    taken = {str(proxy.listen[0].port), str(proxy.backends[0].address.port)}
    assert not taken & set(ports)
    for text in EXAMPLES.values():
        assert not re.search(rf"^ *listen: .*\b{proxy.listen[0].port}\b", text, re.MULTILINE)


def test_the_commands_that_are_shown_have_options_and_targets_that_there_are() -> None:
    text = "\n".join(DOCUMENTS.values())
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, re.MULTILINE))
    assert set(re.findall(r"(?:`|^ *|\$ )make ([a-z-]+)", text, re.MULTILINE)) <= targets
    used = re.findall(r"(?:`|^\$ |^|/)rspd (-[^`\n]*)", text, re.MULTILINE)
    assert len(used) > 5
    assert {word for line in used for word in line.split() if word.startswith("-")} <= options()


def test_the_version_is_this_one_and_the_packages_are_those_that_building_needs() -> None:
    text = "\n".join(DOCUMENTS.values())
    assert set(re.findall(r"\brspd[ _](\d+\.\d+\.\d+)", text)) == {__version__}
    (listed,) = re.findall("apt install --no-install-recommends (.*)", README)
    control = (ROOT / "debian/control").read_text().split("Build-Depends:\n")[1].split("Rules-Requires")[0]
    needed = set(re.findall(r"^ ([\w-]+)(?: \([^)]*\))?,$", control, re.MULTILINE)) - {"debhelper-compat"}
    assert set(listed.split()) == needed | {"make", "dpkg-dev", "debhelper"}


# What is said


def test_the_defaults_that_the_readme_names_are_those_of_the_code() -> None:
    defaults = ProxyConfig._field_defaults
    assert "**By default rspd is serial:**" in README
    assert defaults["max_connections"] == 1
    (seconds,) = re.findall(r"silent for (\d+) seconds", README)
    assert PROXY_KEYS["idle_timeout"].parse(seconds) == defaults["idle_timeout"]
    assert "rspd checks every five seconds" in README
    assert HealthConfig._field_defaults["interval"] == 5
    assert "`health: on` only connects" in README
    assert PROXY_KEYS["health"].parse("on") == HealthConfig()
    proxy = load_config(str(SHIPPED), {}).proxies[0]
    assert f"It listens on {proxy.listen[0]} and relays to {proxy.backends[0]}" in README


def test_the_keys_and_values_that_are_advised_are_such() -> None:
    keys = {**PROXY_KEYS, **GENERAL_KEYS, **HEALTH_KEYS}
    advised = [pair for page in DOCUMENTS.values() for pair in re.findall(r"`([a-z_]+): ([\w-]+)`", page)]
    assert len(advised) > 5
    for key, value in advised:
        if key == "backup":
            assert key in BackendConfig._fields
        else:
            keys[key].parse(value)
    policies = re.findall(r"^\| [^|]+ \| `([\w-]+)` \| [^|]+ \|$", PAGES["balancing.md"].split("--- |\n")[1], re.M)
    assert [PROXY_KEYS["balance"].parse(word) for word in policies] == policies
    assert len(policies) == 4


def measured(work: str, peer: str) -> str:
    """How many times a peer's CPU time rspd takes, as bench has published it."""
    works = json.loads((ROOT / "bench/results/results.json").read_text())["works"]
    rounds = works[work]["rounds"]
    pairs = zip(rounds["rspd"], rounds[peer], strict=True)
    return f"{median(ours['cpu'] / its['cpu'] for ours, its in pairs):.2f}"


@pytest.mark.parametrize(("told", "work"), [("download", "down-1"), ("new connection", "new-64")])
def test_what_the_readme_says_of_the_cost_is_what_bench_has_measured(told: str, work: str) -> None:
    text = rf"A {told} takes (\S+) times the CPU time that it takes with nginx, and (\S+) times that of HAProxy\."
    assert re.findall(text, README) == [(measured(work, "nginx"), measured(work, "haproxy"))]


def test_the_size_of_the_code_is_as_it_is_told() -> None:
    told = re.findall(r"about ([\d,]+) lines of Python in (\d+) modules", CONTRIBUTING)
    lines, modules = (int(number.replace(",", "")) for number in told[0])
    assert modules == len(list((ROOT / "rspd").rglob("*.py")))
    assert abs(CODE.count("\n") - lines) < lines / 20
    (engine,) = re.findall(r"`rspd/engine/`, has about ([\d,]+)", CONTRIBUTING)
    counted = sum(path.read_text().count("\n") for path in (ROOT / "rspd/engine").glob("*.py"))
    assert abs(counted - int(engine.replace(",", ""))) < counted / 20


# Where it stands


def test_the_documents_of_the_package_link_only_to_each_other() -> None:
    listed = (ROOT / "debian/rspd.docs").read_text().split()
    paths = [ROOT / name for name in listed]
    packaged = {file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])}
    for file in packaged:
        if file.suffix == ".md":
            links = re.findall(r"\]\(([^)#]*)(?:#[^)]*)?\)", file.read_text())
            led = {Path(os.path.normpath(file.parent / link)) for link in links if not link.startswith("http")}
            assert led <= packaged, file
    assert {ROOT / "docs" / name for name in PAGES} <= packaged
    assert all(f"](docs/{name})" in README for name in PAGES)


def plain(text: str) -> str:
    """A document without outputs, tables and markup; a manual without its macros."""
    text = FENCED.sub("\n", text)
    text = re.sub(r"(?ms)^\.Bd.*?^\.Ed$", "", text)
    text = re.sub(r"(?m)^\.(?:S[hs]|It|Dd|Dt|Os|Nd|Bl|El|Pp|In)\b.*$", "\n", text)
    text = re.sub(r"(?m)^\|.*\|$|^ {4}.*$|^\.[A-Z][a-z] ", "", text)
    return re.sub(r"[`*]|\]\([^)]*\)|\[", "", text)


def test_no_sentence_stands_in_two_documents() -> None:
    """But what the README's first screen says, and the outputs; the manual is one document."""
    documents = {**DOCUMENTS, "bench": (ROOT / "bench/README.md").read_text()}
    documents["README.md"] = README.split("## Try it")[1]
    documents["manual"] = "\n".join(path.read_text() for path in MAN_PAGES)
    seen: Counter[str] = Counter()
    for text in documents.values():
        sentences = re.split(r"(?<=[.:;])\s+|\n\n", plain(text))
        seen.update({" ".join(sentence.split()) for sentence in sentences if len(sentence.split()) >= 6})
    assert [sentence for sentence, count in seen.items() if count > 1] == []


def test_the_tables_of_a_document_are_whole() -> None:
    for name, text in DOCUMENTS.items():
        rows = [line.count("|") for line in text.splitlines()]
        for (above, line), (below, _) in pairwise(zip(rows, text.splitlines(), strict=True)):
            assert not (line.startswith("|") and above and below and above != below), f"{name}: {line}"
