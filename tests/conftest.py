"""What tests of several files ask for by name."""

from __future__ import annotations

import errno
import os
import resource
import socket
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

from tests.support import KERNEL, eventually, large_pipes, let_ports_go, open_descriptors

# What systemd tells a service. Whoever runs the tests may be one; rspd, started by the tests, is none of its.
FROM_SYSTEMD = (
    "INVOCATION_ID",
    "JOURNAL_STREAM",
    "LISTEN_FDNAMES",
    "LISTEN_FDS",
    "LISTEN_PID",
    "LISTEN_PIDFDID",
    "NOTIFY_SOCKET",
    "RSPD_WORKER",
    "RUNTIME_DIRECTORY",
    "SYSTEMD_EXEC_PID",
    "WATCHDOG_PID",
    "WATCHDOG_USEC",
)
for name in FROM_SYSTEMD:
    os.environ.pop(name, None)

# How long an example takes says how busy the machine is. The fixtures that tests of examples use are the same for each.
settings.register_profile(
    "rspd", deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
)
settings.load_profile("rspd")


def pytest_configure(config: pytest.Config) -> None:
    """Name the mark of our own."""
    config.addinivalue_line("markers", "large_pipes(count): needs so many at once")


@pytest.fixture(autouse=True)
def as_many_large_pipes_as_needed(request: pytest.FixtureRequest) -> Iterator[None]:
    """A user without privileges has pages for 64 large pipes, in all his processes (pipe(7)).

    So the tests that need some run one after the other, those of other suites of this user too. Other tests, or other
    programs, may have the pages now; skips if they have them for long.
    """
    mark = request.node.get_closest_marker("large_pipes")
    if not mark:
        yield
        return
    with socket.socket(socket.AF_UNIX) as turn:
        try:
            eventually(lambda: bound(turn, f"\0rspd-test-large-pipes-{os.geteuid()}"), patience=60)
            eventually(lambda: large_pipes(mark.args[0]), patience=5)
        except AssertionError:
            fewer = f"fewer than {mark.args[0]} large pipes"
            pytest.skip(f"this user's processes leave {fewer}: sysctl fs.pipe-user-pages-soft=0")
        yield


@pytest.fixture
def alone_in_flight() -> Iterator[None]:
    """The tests run one after the other that fill what a user may have in flight, in all his processes (unix(7))."""
    with socket.socket(socket.AF_UNIX) as turn:
        eventually(lambda: bound(turn, f"\0rspd-test-in-flight-{os.geteuid()}"), patience=60)
        yield


def bound(sock: socket.socket, name: str) -> bool:
    """Whether a socket has got a name; not if another has it."""
    try:
        sock.bind(name)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        return False
    return True


def forbidden(config: pytest.Config) -> list[str]:
    """With REQUIRED=1, why tests were skipped, but for what the kernel lacks."""
    reporter = config.pluginmanager.get_plugin("terminalreporter")
    if os.environ.get("REQUIRED") != "1" or not reporter:  # the workers have none
        return []
    reasons = {report.longrepr[2].removeprefix("Skipped: ") for report in reporter.stats.get("skipped", [])}
    return sorted(reason for reason in reasons if not reason.startswith(KERNEL))


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """What is forbidden is a failure."""
    if forbidden(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say what was."""
    for reason in forbidden(config):
        terminalreporter.write_line(f"REQUIRED=1 forbids to skip a test: {reason}", red=True)


@pytest.fixture
def service_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some names of services(5), which a host without the package netbase does not have."""
    known = {"http": 80, "https": 443}

    def look_up(name: str, protocol: str) -> int:
        if protocol != "tcp" or name not in known:
            raise OSError("service/proto not found")
        return known[name]

    monkeypatch.setattr("rspd.config.addresses.socket.getservbyname", look_up)


@pytest.fixture(autouse=True)
def ports_of_the_test() -> Iterator[None]:
    """What `free_port` has kept for the test is given back."""
    yield
    let_ports_go()


@pytest.fixture
def no_descriptor_is_left_open() -> Iterator[None]:
    """The test, and the fixtures that ask for this one, close what they open."""
    before = open_descriptors()
    yield
    let_ports_go()
    assert open_descriptors() == before


@pytest.fixture
def as_many_descriptors_as_allowed() -> Iterator[None]:
    """The test may open more than the 1,024 descriptors that a shell of Debian starts with."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
