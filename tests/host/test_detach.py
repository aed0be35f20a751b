"""Who started rspd. tests/daemon/test_detaching.py has the rest of rspd.host.detach."""

from __future__ import annotations

import os

import pytest

from rspd.host.detach import started_by_systemd


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, False),
        ({"NOTIFY_SOCKET": "/run/systemd/notify"}, True),
        ({"SYSTEMD_EXEC_PID": "OWN"}, True),
        ({"SYSTEMD_EXEC_PID": "1"}, False),
        ({"SYSTEMD_EXEC_PID": ""}, False),
        ({"INVOCATION_ID": "0" * 32}, False),
        ({"INVOCATION_ID": "0" * 32, "SYSTEMD_EXEC_PID": "1", "JOURNAL_STREAM": "1:2"}, False),
        ({"JOURNAL_STREAM": "STDERR"}, False),
        ({"LISTEN_PID": "OWN", "LISTEN_FDS": "1"}, False),
    ],
)
def test_systemd_started_it_where_it_has_said_so_to_this_very_process(
    monkeypatch: pytest.MonkeyPatch, env: dict[str, str], expected: bool
) -> None:
    for name in ("NOTIFY_SOCKET", "SYSTEMD_EXEC_PID", "INVOCATION_ID", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)
    status = os.fstat(2)
    places = {"OWN": str(os.getpid()), "STDERR": f"{status.st_dev}:{status.st_ino}"}
    for name, value in env.items():
        monkeypatch.setenv(name, places.get(value, value))
    assert started_by_systemd() == expected
