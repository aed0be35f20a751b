"""The process while its package is upgraded: it goes on with the modules that it began with, whatever it has to do."""

from __future__ import annotations

import ast
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.daemon.test_reload import File, fail_to_reload
from tests.support import PATIENCE, Backend, echo, eventually, free_port, receive_all, rspd

PACKAGE = Path(__file__).parent.parent.parent / "rspd"

# Coverage would look for the lines of files that are gone.
UNMEASURED = ["env", "-u", "COVERAGE_PROCESS_START", "-u", "COVERAGE_PROCESS_CONFIG"]

BULK = bytes(3_000_000)


class Files:
    """A copy of rspd's files. launcher: what runs rspd from there."""

    def __init__(self, folder: Path) -> None:
        self._package = folder / "rspd"
        shutil.copytree(PACKAGE, self._package, ignore=shutil.ignore_patterns("__pycache__"))
        self.launcher: Sequence[str] = [*UNMEASURED, "--chdir", str(folder)]

    def replace(self) -> None:
        """Put another version there, which fits nothing."""
        for path in self._package.rglob("*.py"):
            path.write_text("raise ImportError('another version')\n")
        command = [*self.launcher, sys.executable, "-m", "rspd", "--version"]
        assert b"another version" in subprocess.run(command, capture_output=True, check=False).stderr


@pytest.fixture
def files(tmp_path: Path) -> Files:
    (tmp_path / "installed").mkdir()
    return Files(tmp_path / "installed")


@pytest.fixture
def backends() -> Iterator[list[Backend]]:
    with Backend(echo) as one, Backend(echo) as two:
        yield [one, two]


# The commands that look at a running rspd.
LOOKS = "status", "connections", "top"


def exchange(port: int, first: bytes = b"", data: bytes = b"hello") -> bytes:
    """What comes back to a new client that sends this, and ends; nothing, if it is refused."""
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
        try:
            client.sendall(first + data)
            client.shutdown(socket.SHUT_WR)
            return receive_all(client)
        except OSError:
            return b""


def test_it_does_all_that_it_can_when_its_files_are_replaced(
    tmp_path: Path, files: Files, backends: list[Backend]
) -> None:
    addresses = [backend.address for backend in backends]
    port = free_port()
    file = File(tmp_path, listen=f"127.0.0.1:{port}", backends=addresses, max_connections=100, connect_timeout="1s")
    with Backend(echo) as gone:
        pass
    with rspd("-c", str(file.path), listen=(), launcher=files.launcher) as daemon, ExitStack() as stack:
        files.replace()
        assert exchange(port) == b"hello"
        assert len(exchange(port, data=BULK)) == len(BULK)
        for policy in "least-connections", "random", "source", "round-robin":
            file.reload(daemon, balance=policy)
            assert exchange(port) == b"hello"

        for version in "v1", "v2":
            file.reload(daemon, send_proxy=version)
            assert exchange(port).endswith(b"hello")
        file.reload(daemon, send_proxy=None, accept_proxy="127.0.0.0/8", allow="192.0.2.0/24")
        assert exchange(port, b"PROXY TCP4 192.0.2.1 192.0.2.2 1 2\r\n") == b"hello"
        assert exchange(port, b"PROXY TCP4 198.51.100.1 192.0.2.2 1 2\r\n") == b""
        assert exchange(port, b"nonsense\r\n") == b""
        file.reload(daemon, accept_proxy=None, allow=None, max_connections_per_client=50, log_level="debug")
        assert exchange(port) == b"hello"

        named = f"localhost:{backends[1].port}"
        file.reload(daemon, backends=[addresses[0], named], resolve="each", resolve_interval="1s")
        assert exchange(port) == b"hello"
        file.reload(daemon, backends=[gone.address, *addresses], resolve=None, resolve_interval=None, health={})
        daemon.wait_for("backend down")
        file.reload(daemon, health={"send": "PING", "expect": "PING", "interval": "50ms"}, queue_timeout="5s")
        eventually(lambda: exchange(port) == b"hello")
        file.reload(daemon, health={"http": "/", "interval": "50ms"}, on_down="abort")
        daemon.wait_for(f"backend down backend={addresses[1]} ")
        file.reload(daemon, backends=[gone.address], health=None, on_down=None, queue_timeout="50ms", max_fails=1)
        assert exchange(port) == b""

        file.write(lisen="nonsense")
        assert "did you mean listen?" in fail_to_reload(daemon)[0]
        taken = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        file.write(lisen=None, listen=[f"127.0.0.1:{port}", f"127.0.0.1:{taken.getsockname()[1]}"])
        assert "Address already in use" in fail_to_reload(daemon)[0]
        web = {"listen": [f"127.0.0.1:{port}", str(tmp_path / "web.sock")], "backends": addresses}
        file.reload(daemon, listen=None, backends=None, proxies={"web": web}, idle_timeout="1h")
        assert exchange(port) == b"hello"

        last = stack.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE))
        last.sendall(b"a")
        assert last.recv(1) == b"a"
        daemon.process.terminate()
        daemon.wait_for("ending connections=1 ")
        last.sendall(b"b")
        assert last.recv(1) == b"b"
        last.close()
        assert daemon.wait() == 0


def test_its_modules_import_each_other_when_they_are_imported_and_never_later() -> None:
    later = set()
    for path in (path for path in PACKAGE.rglob("*.py") if path.parent.name != "commands"):
        for function in ast.walk(ast.parse(path.read_text())):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                imports = [node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
                later |= {(path.name, function.name, ast.unparse(node)) for node in imports}
    own = {entry for entry in later if entry[2].startswith(("import rspd", "from rspd", "from ."))}
    # The first ones are of commands that end. Others are part of the start, but not of each start. If a reload imports
    # those of desk.py, and other versions are installed by then, the reload fails.
    assert own == {
        ("__main__.py", "main", "from rspd.cli import main as run"),
        ("__main__.py", "_look", "from rspd.errors import StartError"),
        ("__main__.py", "_look", "from rspd.log import complain"),
        *(("__main__.py", "_command", f"from rspd.commands.{name} import main as {name}") for name in LOOKS),
        ("parser.py", "parse_known_args", "from rspd.config.values import closest"),
        ("desk.py", "prepare", "from rspd.observing.answers import Answers"),
        ("desk.py", "prepare", "from rspd.admin.client import sockets_of"),
        ("desk.py", "prepare", "from rspd.admin.metrics import Exposition"),
        ("cli.py", "_check", "from rspd.explaining.summary import describe"),
        ("cli.py", "_check", "from rspd.explaining.dump import dump"),
        ("cli.py", "_legacy", "from rspd.running.legacy import Legacy"),
        ("handover.py", "__init__", "from rspd.explaining.dump import dump"),
    }
