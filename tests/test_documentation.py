"""What the man pages and etc/rspd.yaml say is what the code does."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest

from rspd.admin.query import SORTS, Query
from rspd.cli import _parser
from rspd.config.keys import GENERAL_KEYS, PROXY_KEYS, load_config
from rspd.config.pools import BACKEND_KEYS, HEALTH_KEYS
from rspd.config.routes import MATCH_KEYS, ROUTE_KEYS
from rspd.config.schema import Scalar
from rspd.engine.cause import Cause
from rspd.errors import ConfigError
from rspd.explaining.dump import dump
from rspd.explaining.summary import describe
from rspd.net.address import Address
from rspd.settings import BackendConfig, Config, HealthConfig, ProxyConfig
from rspd.snapshot import STATES

COMMANDS = ("status", "connections", "top")

MINIMAL = ["listen: 80", "backend: a:1"]

ROOT = Path(__file__).parent.parent
SHIPPED = ROOT / "etc" / "rspd.yaml"
MAN_PAGES = [ROOT / "packaging" / name for name in ("rspd.8", "rspd.yaml.5", "rspd-status.1")]
RSPD_8, RSPD_YAML_5, RSPD_STATUS_1 = (path.read_text() for path in MAN_PAGES)


# Each table of keys of the configuration, with what is default for it.
TOP = {**PROXY_KEYS, **GENERAL_KEYS}, {**ProxyConfig._field_defaults, **Config._field_defaults}
BACKEND = BACKEND_KEYS, BackendConfig._field_defaults
HEALTH = HEALTH_KEYS, HealthConfig._field_defaults
ROUTES = {**MATCH_KEYS, "pool": ROUTE_KEYS["pool"]}, dict.fromkeys(("from", *MATCH_KEYS, "pool"), ())

# Keys with a mapping or a list below them, which have no default.
BLOCKS = {"routes", "pools", "proxies"}

# Keys whose default depends on how rspd is started, with what that is for rspd.service.
OF_THE_SERVICE: dict[str, Any] = {"control": Address(path="/run/rspd/control.sock"), "control_group": "rspd"}

# What a document says where nothing written is the default.
UNWRITTEN = {"required": None, "none": ""}


def assert_told(listed: Mapping[str, str], of: tuple[Mapping[str, Scalar], Mapping[str, Any]]) -> None:
    """All keys are in the list, with the text of their defaults."""
    keys, defaults = of
    assert listed.keys() == keys.keys()
    for key, text in listed.items():
        if text in UNWRITTEN:
            assert not defaults.get(key)
        else:
            assert keys[key].parse(text) == defaults[key]


def section(page: str, heading: str) -> str:
    """A section of a man page."""
    return page.split(f"\n.Sh {heading}\n", 1)[1].split("\n.Sh ", 1)[0]


def options() -> set[str]:
    """All that the command line knows."""
    return {text for action in _parser()._actions for text in action.option_strings}


def exit_codes(*paths: Path) -> set[int]:
    """Success, and each that the code there names, as the os module does."""
    code = "".join(path.read_text() for path in paths)
    return {0, *(getattr(os, name) for name in re.findall(r"\bEX_[A-Z]+", code))}


PACKAGE = set((ROOT / "rspd").rglob("*.py"))
OF_COMMANDS = set((ROOT / "rspd/commands").glob("*.py"))


def test_the_shipped_configuration_is_valid_and_listens_on_the_loopback_address_only() -> None:
    config = load_config(str(SHIPPED), {})
    assert config.proxies[0] == ProxyConfig((Address("127.0.0.1", 8080),), (BackendConfig(Address("127.0.0.1", 8000)),))


def test_the_shipped_configuration_says_above_listen_what_serial_means_and_which_line_allows_more() -> None:
    text = SHIPPED.read_text()
    serial, browser, line = text[: text.index("\nlisten: ")].splitlines()[-3:]
    assert "serial: it serves one client at a time" in serial
    assert "A browser" in browser
    (named,) = re.findall("`(.*)`", line)
    assert text.splitlines().count(named) == 1
    assert named == "#max_connections: 1"


def test_the_shipped_configuration_explains_each_key_and_shows_its_default() -> None:
    shown = dict(re.findall(r"^#?(\w+): (.*)$", SHIPPED.read_text(), re.MULTILINE))
    listed = {"backends" if key == "backend" else key: text for key, text in shown.items()}
    blocks = dict.fromkeys(BLOCKS - {"proxies"}, "none")
    keys, defaults = TOP
    of_the_service = keys, {**defaults, **OF_THE_SERVICE}
    assert_told({**listed, **blocks, "listen": "required", "backends": "none"}, of_the_service)


def test_the_shipped_configuration_shows_each_key_of_a_check_with_its_default_or_an_example() -> None:
    text = SHIPPED.read_text().replace(shown_routes(), "")
    shown = dict(re.findall(r"^#     (\w+): (.*?)(?:  +#.*)?$", text, re.MULTILINE))
    assert shown.keys() == HEALTH_KEYS.keys()
    for key in ("interval", "timeout", "rise", "fall", "status"):
        assert HEALTH_KEYS[key].parse(shown[key]) == HealthConfig._field_defaults[key]


def shown_routes() -> str:
    """The routes and pools in the shipped configuration, as they stand there."""
    (block,) = re.findall(r"^(#   routes:\n(?:#   .*\n)+)", SHIPPED.read_text(), re.MULTILINE)
    return str(block)


def test_what_the_shipped_configuration_has_in_comments_is_valid(tmp_path: Path) -> None:
    routes = shown_routes()
    text = SHIPPED.read_text().replace(routes, "")
    keys, proxies = text[: text.index("\n#proxies:")], text[text.index("\n#proxies:") :]
    backends = re.findall(r"^#   (  - .*|backends:)$", keys, re.MULTILINE)
    checks = re.findall(r"^#   (  \w+: .*|health:)$", keys, re.MULTILINE)
    of_http = [line for line in checks if not re.match(" +(send|expect|address):", line)]
    of_bytes = [line for line in checks if not re.match(" +(http|host|status|port):", line)]
    for number, lines in enumerate(
        [
            re.sub(r"^#(?=\w+: )", "", keys, flags=re.MULTILINE).splitlines(),
            ["listen: 80", *backends],
            [*MINIMAL, *of_http],
            [*MINIMAL, *of_bytes],
            re.sub("^#", "", proxies, flags=re.MULTILINE).splitlines(),
            ["listen: 443", *re.sub("^#   ", "", routes, flags=re.MULTILINE).splitlines()],
        ]
    ):
        file = tmp_path / f"{number}.yaml"
        file.write_text("\n".join(lines))
        load_config(str(file), {})
    assert load_config(f"{tmp_path}/0.yaml", {}) == load_config(str(SHIPPED), {})._replace(**OF_THE_SERVICE)
    assert [backend.weight for backend in load_config(f"{tmp_path}/1.yaml", {}).proxies[0].backends] == [1, 2, 1, 1]
    assert [proxy.name for proxy in load_config(f"{tmp_path}/4.yaml", {}).proxies] == ["web", "mail"]
    (routed,) = load_config(f"{tmp_path}/5.yaml", {}).proxies
    assert len(routed.routes) == 5
    assert not {key for key in MATCH_KEYS if key != "from"} - {
        key for route in routed.routes for key, said in route._asdict().items() if said
    }


def examples() -> dict[str, str]:
    """The configurations that the manual shows, by where they stand."""
    page = section(RSPD_YAML_5, "EXAMPLES") + "\n" + section(RSPD_YAML_5, "DESCRIPTION")
    blocks = re.findall(r"^\.Bd -literal -offset indent\n(.*?)^\.Ed$", page, re.MULTILINE | re.DOTALL)
    return {f"manual {number}": text.replace(r"\e", "\\") for number, text in enumerate(blocks)}


EXAMPLES = examples()


@pytest.mark.parametrize("text", EXAMPLES.values(), ids=EXAMPLES.keys())
def test_the_examples_are_valid(tmp_path: Path, text: str) -> None:
    file = tmp_path / "rspd.yaml"
    file.write_text(text)
    config = load_config(str(file), {})
    file.write_text(dump(config))
    assert load_config(str(file), {}) == config


def test_the_example_of_a_database_is_the_same_in_both_places() -> None:
    assert f"```yaml\n{EXAMPLES['manual 1']}```" in (ROOT / "docs" / "balancing.md").read_text()


def test_rspd_8_lists_each_option() -> None:
    items = re.findall(r"^\.It (Fl .*)$", section(RSPD_8, "OPTIONS"), re.MULTILINE)
    assert {f"-{name}" for item in items for name in re.findall(r"Fl (\S+)", item)} == options()


def test_rspd_8_lists_each_exit_code() -> None:
    listed = re.findall(r"^\.It (\d+)$", section(RSPD_8, "EXIT STATUS"), re.MULTILINE)
    assert {int(code) for code in listed} == exit_codes(*PACKAGE - OF_COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_rspd_status_1_lists_each_option_of_a_command(command: str) -> None:
    run = subprocess.run([sys.executable, "-m", "rspd", command, "--help"], capture_output=True, text=True, check=True)
    told = set(re.findall(r"^  (?:-\w, )?--([\w-]+)", run.stdout, re.MULTILINE))
    common, *others = section(RSPD_STATUS_1, "OPTIONS").split("\n.Ss ")
    own = {text.partition("\n")[0]: set(re.findall(r"^\.It .*?Fl -([\w-]+)", text, re.MULTILINE)) for text in others}
    shared = set(re.findall(r"^\.It .*?Fl -([\w-]+)", common, re.MULTILINE))
    assert own.keys() == set(COMMANDS)
    assert told == own[command] | shared
    synopsis = section(RSPD_STATUS_1, "SYNOPSIS").split(f".Cm {command}\n")[1].split(".Nm")[0]
    assert set(re.findall(r"Fl -([\w-]+)", synopsis)) == told - {"help"}


def test_rspd_status_1_lists_each_exit_code() -> None:
    listed = re.findall(r"^\.It (\d+)$", section(RSPD_STATUS_1, "EXIT STATUS"), re.MULTILINE)
    # 1: as status --check says it. 70: whatever fails.
    codes = exit_codes(ROOT / "rspd/parser.py", *OF_COMMANDS)
    assert {int(code) for code in listed} == codes | {1, os.EX_SOFTWARE}


def test_rspd_status_1_says_how_connections_are_asked_for_and_what_they_may_be_doing() -> None:
    (keys,) = re.findall(r"^\.Cm (proxy , .*)\nand\n\.Cm (\w+) ,$", RSPD_STATUS_1, re.MULTILINE)
    assert " , ".join(keys).split(" , ") == [*Query._fields]
    assert re.findall(r"^\.It Cm ([a-z -]+)$", section(RSPD_STATUS_1, "OUTPUT OF CONNECTIONS"), re.MULTILINE) == [
        *STATES
    ]
    (words,) = re.findall(r"^\.Cm (bytes .*)\nor\n\.Cm (\w+) \.$", RSPD_STATUS_1, re.MULTILINE)
    assert " , ".join(words).split(" , ") == [*SORTS]


def test_rspd_8_lists_each_cause_of_an_end() -> None:
    causes = section(RSPD_8, "LOG").split("\n.Ss Causes\n", 1)[1]
    assert set(re.findall(r"^\.It Cm (\S+)", causes, re.MULTILINE)) == set(get_args(Cause))


def explained(heading: str) -> dict[str, str]:
    """What rspd.yaml(5) says below a heading of each key, its own line first."""
    text = re.split(rf"^\.S[hs] {heading}$", RSPD_YAML_5, flags=re.MULTILINE)[1]
    text = re.split(r"^\.S[hs] ", text, flags=re.MULTILINE)[0]
    items = re.findall(r"^\.It Cm (\w+) : (.*(?:\n(?!\.It Cm \w+ : ).*)*)", text, re.MULTILINE)
    return {"backends" if key == "backend" else key: item for key, item in items}


def test_rspd_8_names_keys_and_causes_that_there_are() -> None:
    assert set(re.findall(r"\bcause=([a-z-]+)", RSPD_8)) <= set(get_args(Cause))
    words = set(re.findall(r"(?<![\w./])[a-z]+(?:_[a-z]+)+", RSPD_8))
    assert words - {"sd_notify", "sd_listen_fds"} <= TOP[0].keys()


def test_rspd_8_shows_lines_of_the_log_that_the_code_writes() -> None:
    code = "".join(path.read_text() for path in (ROOT / "rspd").rglob("*.py"))
    shown = re.findall(r"^([a-z][a-z ,]+[a-z])(?: \w+=.*)$", section(RSPD_8, "LOG"), re.MULTILINE)
    assert len(shown) == 17
    assert [text for text in shown if text not in code] == []


def test_the_examples_leave_the_ports_of_the_installed_service_alone() -> None:
    (listened,) = load_config(str(SHIPPED), {}).proxies[0].listen
    for page in (RSPD_8, RSPD_YAML_5):
        assert not re.search(rf"(?<!\d){listened.port}(?!\d)", section(page, "EXAMPLES"))


HEADINGS = {"KEYS": TOP, "Backends": BACKEND, "Health checks": HEALTH, "Routes": ROUTES}


@pytest.mark.parametrize("heading", HEADINGS)
def test_rspd_yaml_5_lists_each_key_with_its_default(heading: str) -> None:
    listed = {}
    for key, item in explained(heading).items():
        found = re.findall(r"^Default: (\S+)\.$", item, re.MULTILINE)
        listed[key] = found[0] if found else "none"
    for name in ("listen", "backends", "address"):
        if name in listed:
            assert listed[name] == "none"
            listed[name] = "required"
    assert listed.pop("proxies", "none") == "none"
    assert_told(listed, HEADINGS[heading])


def test_the_manual_the_shipped_configuration_and_the_code_have_the_keys_in_the_same_order() -> None:
    assert [key for key in explained("KEYS") if key != "proxies"] == list(TOP[0])
    shown = re.findall(r"^#?(\w+): ", SHIPPED.read_text(), re.MULTILINE)
    assert ["backends" if key == "backend" else key for key in shown] == [key for key in TOP[0] if key not in BLOCKS]
    assert list(explained("Routes")) == [*MATCH_KEYS, "pool"]


def test_rspd_yaml_5_says_how_long_a_duration_may_be() -> None:
    (longest,) = re.findall(r"^The longest duration is\n\.Ql (\d+)h \.$", RSPD_YAML_5, re.MULTILINE)
    key = TOP[0]["idle_timeout"]
    assert takes(key, f"{longest}h")
    with pytest.raises(ValueError, match=f"^expected at most {longest}h, found '{longest}.1h'$"):
        key.parse(f"{longest}.1h")


def keys_that_expect(what: str) -> list[Any]:
    """The headings and keys whose parser asks for that: what it says of a value that is none of anything."""
    found = []
    for heading, (keys, _) in HEADINGS.items():
        for name, key in keys.items():
            try:
                key.parse("?")
            except ValueError as error:
                if f"expected {what}" in str(error):
                    found.append(pytest.param(heading, name, id=f"{heading}-{name}"))
    return found


def takes(key: Scalar, text: str) -> bool:
    """Whether it is a value of the key."""
    try:
        key.parse(text)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize(("heading", "name"), [*keys_that_expect("a whole number"), *keys_that_expect("statuses")])
def test_rspd_yaml_5_says_the_range_of_each_number(heading: str, name: str) -> None:
    key = HEADINGS[heading][0][name]
    line = explained(heading)[name].splitlines()[0]
    (bounds,) = re.findall(r" No from (\d+) to (\d+)", line)
    low, high = map(int, bounds)
    assert [number for number in (low - 1, low, high, high + 1) if takes(key, f"{number}")] == [low, high]
    for word in ("off", "all"):
        assert takes(key, word) == line.endswith(f"or Cm {word}")


@pytest.mark.parametrize(("heading", "name"), keys_that_expect("a duration"))
def test_rspd_yaml_5_says_of_each_duration_how_short_it_may_be_and_whether_it_may_be_off(
    heading: str, name: str
) -> None:
    key = HEADINGS[heading][0][name]
    line = explained(heading)[name].splitlines()[0]
    assert line.startswith("Ar DURATION No ")
    assert takes(key, "off") == line.endswith(", or Cm off")
    assert takes(key, "0") == ("of 0 or more" in line)
    assert takes(key, "0.001ms") == ("of 0 or more" in line or "above 0" in line)
    least = re.findall("of at least (.*)ms", line)
    assert takes(key, "9ms") == (not least)
    assert least in ([], ["10"])
    assert takes(key, "10ms")


@pytest.mark.parametrize(("heading", "name"), keys_that_expect("one of"))
def test_rspd_yaml_5_says_the_words_of_each_key_that_takes_words(heading: str, name: str) -> None:
    key = HEADINGS[heading][0][name]
    item = explained(heading)[name]
    said = {word for words in re.findall(r"\bCm (.*)$", item, re.MULTILINE) for word in re.findall(r"[\w-]{2,}", words)}
    with pytest.raises(ValueError, match="expected one of ") as caught:
        key.parse("?")
    expected = str(caught.value).split("one of ", 1)[1].split(", found", 1)[0].split(", ")
    assert set(expected) <= said
    assert all(takes(key, word) for word in expected)


def test_rspd_yaml_5_says_how_long_the_name_of_a_proxy_may_be(tmp_path: Path) -> None:
    (bounds,) = re.findall(r"^A name has (\d+) to (\d+) letters", RSPD_YAML_5, re.MULTILINE)
    file = tmp_path / "rspd.yaml"
    valid = []
    for length in (int(bounds[0]) - 1, int(bounds[0]), int(bounds[1]), int(bounds[1]) + 1):
        file.write_text(f"proxies: {{'{length * 'x'}': {{listen: 80, backend: 'a:1'}}}}")
        try:
            load_config(str(file), {})
        except ConfigError:
            continue
        valid.append(f"{length}")
    assert valid == list(bounds)


def test_rspd_yaml_5_shows_what_a_check_prints(tmp_path: Path) -> None:
    blocks = re.findall(r"^\.Bd -literal$\n(.*?)^\.Ed$", section(RSPD_YAML_5, "DIAGNOSTICS"), re.MULTILINE | re.DOTALL)
    good, bad = (block.partition("$ rspd --check -c rspd.yaml\n") for block in blocks)
    file = tmp_path / "rspd.yaml"
    file.write_text(next(text for name, text in EXAMPLES.items() if "manual" in name and "listen: 8090" in text))
    assert good[2].splitlines() == ["rspd.yaml: valid", *describe(load_config(str(file), {}))]
    file.write_text(bad[0].removeprefix("$ cat rspd.yaml\n"))
    with pytest.raises(ConfigError) as caught:
        load_config(str(file), {})
    assert [f"rspd: {error}".replace(str(file), file.name) for error in caught.value.errors] == bad[2].splitlines()


PACKAGES = {"man": "man-db", "mandoc": "mandoc"}


@pytest.mark.parametrize("path", MAN_PAGES, ids=lambda path: path.name)
@pytest.mark.parametrize("command", ["mandoc -T lint -W warning", "man --warnings -E UTF-8 -Tutf8 -l"])
def test_the_man_pages_are_without_mistakes(path: Path, command: str) -> None:
    words = command.split()
    if not shutil.which(words[0]):
        pytest.skip(f"{words[0]} is not here: apt install {PACKAGES[words[0]]}")
    environment = {"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8", "MANWIDTH": "80"}
    end = subprocess.run([*words, path], capture_output=True, text=True, env=environment, check=False)
    assert (end.stderr, end.returncode) == ("", 0), end.stdout
