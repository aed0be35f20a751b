"""The package's life: install, upgrade, remove, install again, purge."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import Backend, answer, eventually
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
    bare.shell("rm -rf /etc/systemd/system/rspd* /etc/rspd /usr/sbin/policy-rc.d")
    bare.systemctl("daemon-reload")
    bare.systemctl("reset-failed")


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
        *(f"/usr/share/man/man1/rspd-{name}.1.gz" for name in ("status", "connections", "top")),
        "/usr/share/bash-completion/completions/rspd",
        "/usr/share/zsh/vendor-completions/_rspd",
        "/usr/share/doc/rspd/README.md",
        "/usr/share/doc/rspd/CHANGELOG.md",
        *(f"/usr/share/doc/rspd/docs/{name}" for name in ("service.md", "balancing.md", "speed.md", "speed.svg")),
        *(f"/usr/share/doc/rspd/docs/{name}" for name in ("metrics.md", "rspd-alerts.yml", "rspd-dashboard.json")),
        *(f"/usr/share/doc/rspd/docs/{name}" for name in ("looking.md", "top.svg")),
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


WRONG = CONFIGURATION + "max_connection: 3\n"


def test_an_upgrade_leaves_what_has_a_wrong_file_alone_and_says_what_is_wrong(
    clean: Machine, deb: Path, newer: Path
) -> None:
    clean.install(deb)
    clean.write("/etc/rspd/one.yaml", CONFIGURATION.replace(":8080", ":8081"))
    clean.write("/etc/rspd/two.yaml", CONFIGURATION.replace(":8080", ":8082"))
    clean.systemctl("enable", "--quiet", "rspd-worker@1")
    clean.systemctl("restart", "rspd")
    clean.systemctl("start", "rspd@one", "rspd@two")
    wrong, right = ["rspd-worker@1.service", "rspd.service", "rspd@one.service"], ["rspd@two.service"]
    units = [*wrong, *right]
    eventually(lambda: [clean.show("ActiveState", unit) for unit in units] == ["active"] * 4)
    clean.write("/etc/rspd.yaml", WRONG)
    clean.write("/etc/rspd/one.yaml", "nonsense\n")
    before = {unit: clean.pid(unit) for unit in units}

    said = clean.install(newer)
    assert said.count("rspd: /etc/rspd.yaml:3: max_connection: unknown key, did you mean max_connections?") == 1
    assert said.count("rspd: /etc/rspd/one.yaml:1: ") == 1
    names = " ".join(wrong)
    assert f"rspd: with a wrong file, not restarted: {names}. Correct it, then: systemctl restart {names}\n" in said
    assert [unit for unit in units if clean.pid(unit) == before[unit]] == wrong
    with Backend(answer, port=8000):
        assert [ask(port) for port in (8080, 8081, 8082)] == [b"ok"] * 3

    clean.write("/etc/rspd.yaml", CONFIGURATION)
    clean.write("/etc/rspd/one.yaml", CONFIGURATION.replace(":8080", ":8081"))
    clean.systemctl("restart", *wrong)
    assert not [unit for unit in units if clean.pid(unit) == before[unit]]


def test_an_upgrade_checks_the_files_of_services_that_wait_behind_their_sockets(
    clean: Machine, deb: Path, newer: Path
) -> None:
    clean.install(deb)
    clean.systemctl("stop", "rspd")
    sockets = ["rspd.socket", "rspd@one.socket", "rspd@two.socket"]
    clean.systemctl("start", *sockets)
    clean.write("/etc/rspd.yaml", WRONG)
    clean.write("/etc/rspd/one.yaml", WRONG)
    clean.write("/etc/rspd/two.yaml", "backend: 127.0.0.1:8000\n")
    said = clean.install(newer)
    for path in ("/etc/rspd.yaml", "/etc/rspd/one.yaml"):
        assert said.count(f"rspd: {path}:3: max_connection: unknown key") == 1
    assert "rspd: with a wrong file, not restarted: rspd.service rspd@one.service. Correct it, " in said
    assert "warning: " not in said, "the socket of two.yaml brings the address that this file lacks"
    services = ["rspd.service", "rspd@one.service", "rspd@two.service"]
    assert [clean.show("ActiveState", unit) for unit in sockets + services] == ["active"] * 3 + ["inactive"] * 3


def test_a_file_that_its_user_cannot_read_is_a_wrong_one(clean: Machine, deb: Path, newer: Path) -> None:
    clean.install(deb)
    before = clean.pid()
    clean.shell("chmod 600 /etc/rspd.yaml")
    assert "rspd: /etc/rspd.yaml: cannot be read: Permission denied; " in clean.install(newer)
    assert clean.pid() == before
    clean.shell("chmod 644 /etc/rspd.yaml")


def test_an_upgrade_checks_the_file_that_a_drop_in_names(clean: Machine, deb: Path, newer: Path) -> None:
    clean.install(deb)
    clean.write("/etc/rspd/other.yaml", CONFIGURATION)
    options = "-c /etc/rspd/other.yaml"
    start, reload = f"ExecStart=\nExecStart=rspd {options}", f"ExecReload=\nExecReload=rspd --check {options}"
    clean.drop_in("rspd.service", f"[Service]\n{start}\n{reload}")
    clean.systemctl("restart", "rspd")
    before = clean.pid()
    clean.write("/etc/rspd/other.yaml", WRONG)
    assert "rspd: /etc/rspd/other.yaml:3: " in clean.install(newer)
    assert clean.pid() == before


@pytest.mark.parametrize("setting", ["Group", "SupplementaryGroups"])
def test_an_upgrade_checks_the_file_with_the_groups_of_the_service(
    clean: Machine, deb: Path, newer: Path, setting: str
) -> None:
    clean.install(deb)
    clean.shell("getent group cfg || groupadd cfg; chgrp cfg /etc/rspd.yaml; chmod 640 /etc/rspd.yaml")
    clean.drop_in("rspd.service", f"[Service]\n{setting}=cfg")
    clean.systemctl("restart", "rspd")
    before = clean.pid()
    assert "wrong file" not in clean.install(newer)
    assert clean.pid() != before
    clean.systemctl("stop", "rspd")


def test_where_the_check_itself_fails_an_upgrade_names_its_command(clean: Machine, deb: Path, newer: Path) -> None:
    clean.install(deb)
    clean.write("/etc/rspd/my own.yaml", CONFIGURATION)
    options = "-c '/etc/rspd/my own.yaml'"
    start, reload = f"ExecStart=\nExecStart=rspd {options}", f"ExecReload=\nExecReload=rspd --check {options}"
    clean.drop_in("rspd.service", f"[Service]\n{start}\n{reload}")
    clean.systemctl("restart", "rspd")
    before = clean.pid()
    said = clean.install(newer)
    assert re.search(r"rspd: the check that failed: setpriv --reuid=rspd .* rspd --check -c .*my own", said)
    assert clean.pid() == before


def test_an_upgrade_starts_nothing_that_was_stopped(clean: Machine, deb: Path, newer: Path) -> None:
    clean.install(deb)
    clean.systemctl("enable", "--quiet", "rspd.socket")
    clean.systemctl("stop", "rspd")
    clean.install(newer)
    units = ["rspd.service", "rspd.socket"]
    assert [clean.show("ActiveState", unit) for unit in units] == ["inactive"] * 2
    assert [clean.show("UnitFileState", unit) for unit in units] == ["enabled"] * 2


@pytest.mark.parametrize("now", [["--now"], []], ids=["stopped", "running"])
def test_an_upgrade_leaves_a_masked_service_alone(clean: Machine, deb: Path, newer: Path, now: list[str]) -> None:
    clean.install(deb)
    clean.systemctl("mask", "--quiet", *now, "rspd")
    before = clean.pid()
    about_it = [line for line in clean.install(newer).splitlines() if "rspd.service" in line]
    assert about_it == ([] if now else ["rspd: masked, not restarted: rspd.service"])
    assert (clean.pid(), clean.show("LoadState")) == (before, "masked")


def test_where_the_administrator_forbids_it_an_upgrade_restarts_nothing(clean: Machine, deb: Path, newer: Path) -> None:
    clean.install(deb)
    clean.write("/etc/rspd/one.yaml", CONFIGURATION.replace(":8080", ":8082"))
    clean.systemctl("start", "rspd@one")
    before = [clean.pid(), clean.pid("rspd@one")]
    clean.write("/usr/sbin/policy-rc.d", "#!/bin/sh\nexit 101\n")
    clean.shell("chmod +x /usr/sbin/policy-rc.d")
    clean.install(newer)
    assert [clean.pid(), clean.pid("rspd@one")] == before
    clean.path("/usr/sbin/policy-rc.d").unlink()


def test_installed_again_with_a_wrong_file_it_does_not_start_and_says_why(clean: Machine, deb: Path) -> None:
    clean.install(deb)
    clean.run("apt-get", "remove", "-y", "rspd")
    clean.write("/etc/rspd.yaml", WRONG)
    said = clean.install(deb)
    assert "rspd: /etc/rspd.yaml:3: " in said
    assert "not started: rspd.service. Correct it, then: systemctl restart rspd.service\n" in said
    assert clean.show("ActiveState") == "inactive"


def test_installed_again_with_a_wrong_file_its_socket_does_not_listen(clean: Machine, deb: Path) -> None:
    clean.install(deb)
    clean.systemctl("disable", "--quiet", "rspd")
    clean.systemctl("enable", "--quiet", "rspd.socket")
    clean.run("apt-get", "remove", "-y", "rspd")
    clean.write("/etc/rspd.yaml", WRONG)
    said = clean.install(deb)
    assert "rspd: /etc/rspd.yaml:3: " in said
    assert "not started: rspd.socket. Correct it, then: systemctl restart rspd.socket\n" in said
    assert clean.show("ActiveState", "rspd.socket") == "inactive"


def test_an_installation_says_why_the_service_does_not_run(clean: Machine, deb: Path) -> None:
    with socket.create_server(("127.0.0.1", 8080)):
        said = clean.install(deb)
    reason = "cannot listen on 127.0.0.1:8080: Address already in use; "
    assert f"rspd: rspd.service does not run: {reason}" in said


@pytest.mark.parametrize(
    ("start", "reason"),
    [
        ("ExecStartPre=sleep 1", "cannot listen on 127.0.0.1:8080: Address already in use; "),
        ("ExecStart=\nExecStart=false", "see systemctl status rspd.service\n"),
    ],
    ids=["not yet", "never"],
)
def test_an_installation_waits_for_the_reason_that_the_next_attempt_says(
    clean: Machine, deb: Path, start: str, reason: str
) -> None:
    clean.drop_in("rspd.service", f"[Service]\nRestartSec=0\n{start}")
    with socket.create_server(("127.0.0.1", 8080)):
        said = clean.install(deb)
    assert f"rspd: rspd.service does not run: {reason}" in said


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


@pytest.mark.parametrize("how", ["installed", "not removed"])
def test_what_is_enabled_runs_again(clean: Machine, deb: Path, how: str) -> None:
    clean.install(deb)
    for name, port in (("one", 8082), ("two", 8083)):
        clean.write(f"/etc/rspd/{name}.yaml", CONFIGURATION.replace(":8080", f":{port}"))
    clean.write("/etc/rspd/three.yaml", "backend: 127.0.0.1:8000\n")
    enabled = ["rspd.socket", "rspd-worker@1.service", "rspd@one.service", "rspd@three.service", "rspd@three.socket"]
    clean.systemctl("enable", "--quiet", *enabled)
    clean.systemctl("stop", "rspd")
    clean.systemctl("start", "rspd.socket", "rspd@three.socket")
    clean.systemctl("start", "rspd", "rspd@one", "rspd@three")
    if how == "installed":
        clean.run("apt-get", "remove", "-y", "rspd")
        clean.install(deb)
    else:
        clean.shell("echo exit 1 >> /var/lib/dpkg/info/rspd.prerm")
        assert clean.run("dpkg", "--remove", "rspd", check=False).returncode
        clean.install(deb, "--reinstall")
    eventually(lambda: [clean.show("ActiveState", unit) for unit in ["rspd", *enabled]] == ["active"] * 6)
    assert clean.show("ActiveState", "rspd@two") == "inactive"


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


def test_purged_it_takes_its_own_folders_and_leaves_those_of_others(clean: Machine, deb: Path) -> None:
    clean.install(deb)
    clean.write("/etc/rspd/one.yaml", "listen: /run/rspd-one/web\nbackend: 127.0.0.1:8000\n")
    clean.systemctl("start", "rspd@one")
    clean.write("/run/rspd-other/file", "kept\n")
    clean.run("dpkg", "--purge", "rspd")
    assert clean.shell("find /run -path '/run/rspd*'").stdout.split() == ["/run/rspd-other", "/run/rspd-other/file"]
    clean.shell("rm -r /run/rspd-other")


def test_purged_after_its_user_it_takes_its_folder_and_complains_of_nothing(clean: Machine, deb: Path) -> None:
    clean.install(deb)
    clean.systemctl("stop", "rspd")
    clean.run("userdel", "rspd")
    assert clean.path("/run/rspd").is_dir()
    purged = clean.run("dpkg", "--purge", "rspd")
    assert "rspd'" not in purged.stderr
    assert not clean.path("/run/rspd").exists()


def test_the_names_of_ports_come_along(clean: Machine, deb: Path) -> None:
    clean.install(deb)
    assert clean.run("dpkg-query", "-W", "-f", "${Recommends}", "rspd").stdout == "netbase"


def test_the_packages_own_test_passes(clean: Machine, deb: Path) -> None:
    clean.install(deb)
    (script,) = (path for path in (PROJECT / "debian/tests").iterdir() if path.name != "control")
    clean.write("/root/autopkgtest", script.read_text())
    clean.shell("chmod +x /root/autopkgtest && /root/autopkgtest")
