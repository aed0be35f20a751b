"""The units for systemd that the package installs, as far as they can be read."""

from __future__ import annotations

from pathlib import Path

PACKAGING = Path(__file__).parent.parent / "packaging"


def settings(name: str) -> set[str]:
    """What a unit sets, each with its section."""
    found, section = set(), ""
    for line in (PACKAGING / name).read_text().splitlines():
        if line.startswith("["):
            section = line
        elif line and not line.startswith("#"):
            found.add(f"{section}{line}")
    return found


def differences(name: str) -> list[set[str]]:
    """What a unit has in place of settings of rspd.service, the first ones; descriptions left out."""
    own, other = settings("rspd.service"), settings(name)
    return [{line for line in lines if "Description=" not in line} for lines in (own - other, other - own)]


def test_an_instance_is_run_as_the_service_is() -> None:
    assert differences("rspd@.service") == [
        {
            "[Service]ExecStart=/usr/bin/rspd",
            "[Service]ExecReload=/usr/bin/rspd --check",
            "[Service]RuntimeDirectory=rspd",
        },
        {
            "[Service]ExecStart=/usr/bin/rspd -c /etc/rspd/%i.yaml",
            "[Service]ExecReload=/usr/bin/rspd --check -c /etc/rspd/%i.yaml",
            "[Service]RuntimeDirectory=rspd-%i",
        },
    ]


def test_a_worker_is_run_as_the_service_is_but_for_its_sockets_its_name_and_restarts() -> None:
    assert differences("rspd-worker@.service") == [
        {
            "[Unit]StartLimitIntervalSec=60s",
            "[Unit]StartLimitBurst=70",
            "[Service]RestartSec=250ms",
            "[Service]RestartPreventExitStatus=64 71 77 78",
            "[Install]WantedBy=multi-user.target",
        },
        {
            "[Unit]Requires=rspd.socket",
            "[Unit]After=rspd.socket",
            "[Unit]ReloadPropagatedFrom=rspd.service",
            "[Unit]StartLimitIntervalSec=0",
            "[Service]Sockets=rspd.socket",
            "[Service]Environment=RSPD_WORKER=%i",
            "[Service]RestartSec=5s",
            "[Install]WantedBy=rspd.service",
        },
    ]
