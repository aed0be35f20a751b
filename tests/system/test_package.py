"""The package's life: install, upgrade, remove, install again, purge."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Backend, answer
from tests.system.machine import Machine
from tests.system.traffic import CONFIGURATION, ask

PROJECT = Path(__file__).parent.parent.parent

UNITS = ["rspd.service", "rspd.socket", "rspd@x.service", "rspd@x.socket", "rspd-worker@1.service"]


@pytest.fixture
def newer(deb: Path, tmp_path: Path) -> Path:
    """The package with the next version."""
    tree = tmp_path / "tree"
    subprocess.run(["dpkg-deb", "-R", str(deb), str(tree)], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(control.read_text().replace("\nVersion: ", "\nVersion: 9"))
    subprocess.run(["dpkg-deb", "-b", str(tree), str(tmp_path)], check=True, capture_output=True)
    return next(tmp_path.glob("*.deb"))


@pytest.fixture
def clean(bare: Machine) -> Iterator[Machine]:
    """A machine on which the package was never installed, or is purged."""
    bare.mark()
    yield bare
    bare.run("dpkg", "--purge", "rspd")


def listening(machine: Machine) -> set[str]:
    """Where TCP is listened on."""
    return {line.split()[3] for line in machine.run("ss", "-Hltn").stdout.splitlines()}


def files(machine: Machine) -> set[str]:
    """All there is on the disk, besides what logs, caches and package lists have of it."""
    skip = "/proc /sys /run/[^r]* /dev /tmp /root /var/log /var/cache /var/lib/apt /var/lib/dpkg"
    prune = " -o ".join(f"-path '{path}'" for path in skip.split())
    return set(machine.shell(f"find / \\( {prune} \\) -prune -o -print").stdout.splitlines())


def test_a_fresh_install_ends_with_a_service_on_the_loopback_address_only(clean: Machine, deb: Path) -> None:
    before = listening(clean)
    clean.install(deb)
    assert clean.show("ActiveState") == "active"
    assert clean.show("UnitFileState") == "enabled"
    assert [clean.show(name, "rspd.socket") for name in ("ActiveState", "UnitFileState")] == ["inactive", "disabled"]
    assert clean.run("dpkg", "-V", "rspd").stdout == ""
    assert listening(clean) - before == {"127.0.0.1:8080"}
    with Backend(answer, port=8000):
        assert ask() == b"ok"


def test_systemd_has_nothing_to_say_about_the_units(clean: Machine, deb: Path) -> None:
    clean.install(deb)
    verified = clean.run("systemd-analyze", "verify", "--man=no", *UNITS)
    about_rspd = [line for line in (verified.stdout + verified.stderr).splitlines() if "rspd" in line]
    assert about_rspd == []


@pytest.mark.parametrize("unit", ["rspd.service", "rspd@x.service", "rspd-worker@1.service"])
def test_the_exposure_is_1_5_at_most(clean: Machine, deb: Path, unit: str) -> None:
    clean.install(deb)
    analysed = clean.run("systemd-analyze", "security", "--no-pager", unit).stdout
    assert float(re.findall(r"Overall exposure level for \S+: ([\d.]+)", analysed)[0]) <= 1.5


def test_manual_pages_and_completions_are_there(clean: Machine, deb: Path) -> None:
    clean.install(deb)
    listed = clean.run("dpkg", "-L", "rspd").stdout.splitlines()
    for path in (
        "/usr/share/man/man8/rspd.8.gz",
        "/usr/share/man/man5/rspd.yaml.5.gz",
        "/usr/share/bash-completion/completions/rspd",
        "/usr/share/zsh/vendor-completions/_rspd",
    ):
        assert path in listed


def test_an_upgrade_keeps_an_edited_configuration_and_restarts(clean: Machine, deb: Path, newer: Path) -> None:
    clean.install(deb)
    edited = CONFIGURATION.replace(":8080", ":8081")
    clean.write("/etc/rspd.yaml", edited)
    clean.systemctl("restart", "rspd")
    clean.write("/etc/rspd/one.yaml", CONFIGURATION.replace(":8080", ":8082"))
    clean.systemctl("start", "rspd@one")
    before = [clean.pid(), clean.pid("rspd@one")]
    clean.install(newer)
    assert clean.run("dpkg-query", "-W", "-f", "${Version}", "rspd").stdout.startswith("9")
    assert clean.path("/etc/rspd.yaml").read_text() == edited
    assert [clean.show("ActiveState", unit) for unit in ("rspd", "rspd@one")] == ["active", "active"]
    after = [clean.pid(), clean.pid("rspd@one")]
    assert not set(before) & set(after), "both run the new version"
    with Backend(answer, port=8000):
        assert [ask(8081), ask(8082)] == [b"ok", b"ok"]
    clean.shell("rm -r /etc/rspd/one.yaml; systemctl stop rspd@one")


def test_an_upgrade_with_the_socket_refuses_nobody(clean: Machine, deb: Path, newer: Path) -> None:
    clean.install(deb)
    clean.systemctl("stop", "rspd")
    clean.systemctl("start", "rspd.socket")
    with Backend(answer, port=8000):
        assert ask() == b"ok"
        before = clean.pid()
        upgrade = subprocess.Popen(clean.command("dpkg", "-i", str(copy(clean, newer))), stdout=subprocess.PIPE)
        answers = set()
        while upgrade.poll() is None:
            answers.add(ask())
        upgrade.communicate()
        assert upgrade.returncode == 0
        assert answers == {b"ok"}
        assert ask() == b"ok"
        assert clean.pid() != before


def copy(machine: Machine, deb: Path) -> Path:
    """Put a package into the machine; where it is there."""
    machine.path(f"/root/{deb.name}").write_bytes(deb.read_bytes())
    return Path("/root", deb.name)


def test_a_service_that_was_disabled_stays_so_when_it_is_upgraded(clean: Machine, deb: Path, newer: Path) -> None:
    clean.install(deb)
    clean.systemctl("disable", "--quiet", "--now", "rspd")
    clean.install(newer)
    assert [clean.show("ActiveState"), clean.show("UnitFileState")] == ["inactive", "disabled"]


def test_removed_it_leaves_the_configuration_and_installed_again_it_uses_that(clean: Machine, deb: Path) -> None:
    before = listening(clean)
    clean.install(deb)
    edited = CONFIGURATION.replace(":8080", ":8081")
    clean.write("/etc/rspd.yaml", edited)
    clean.run("apt-get", "remove", "-y", "rspd")
    assert clean.show("LoadState") == "not-found"
    assert listening(clean) == before
    assert clean.path("/etc/rspd.yaml").read_text() == edited
    clean.install(deb)
    assert clean.show("ActiveState") == "active"
    with Backend(answer, port=8000):
        assert ask(8081) == b"ok"


def test_purged_it_leaves_nothing_but_the_user(clean: Machine, deb: Path) -> None:
    before, listened = files(clean), listening(clean)
    clean.install(deb)
    clean.systemctl("enable", "--quiet", "rspd.socket")
    clean.write("/etc/rspd/one.yaml", CONFIGURATION.replace(":8080", ":8082"))
    clean.systemctl("enable", "--quiet", "--now", "rspd@one")
    with Backend(answer, port=8000):
        assert ask() == b"ok"
    clean.systemctl("stop", "rspd@one")
    clean.path("/etc/rspd/one.yaml").unlink()
    clean.run("dpkg", "--purge", "rspd")
    clean.systemctl("daemon-reload")
    assert files(clean) - before == set()
    assert listening(clean) == listened
    assert clean.systemctl("list-units", "--all", "--plain", "--no-legend", "rspd*").stdout == ""
    assert clean.run("getent", "passwd", "rspd").stdout


def test_the_packages_own_test_passes(clean: Machine, deb: Path) -> None:
    clean.install(deb)
    (script,) = (path for path in (PROJECT / "debian/tests").iterdir() if path.name != "control")
    clean.write("/root/autopkgtest", script.read_text())
    clean.shell("chmod +x /root/autopkgtest && /root/autopkgtest")
