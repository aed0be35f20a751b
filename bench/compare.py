"""CPU time of rspd beside nginx's stream module and systemd-socket-proxyd, in one run: `make compare`.

Each proxy relays the same work to the same backend, in turn and several times over; the figure is the CPU time of
the proxy's processes as the scheduler counted it. The proxy has one processor for itself, load and backend share
the others. Connections come one at a time, where each packet wakes a sleeping peer and the proxy pays for that, and
16 at a time; streams one at a time.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

SOCKET_PROXYD = "/lib/systemd/systemd-socket-proxyd"
REQUEST = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
ANSWER = b"HTTP/1.1 200 OK\r\nContent-Length: 128\r\n\r\n" + b"x" * 128
CHUNK = 1 << 18
AT_A_TIME = 16

NGINX_CONFIG = """
daemon off; worker_processes 1; pid {folder}/nginx.pid; error_log stderr crit;
{module}
events {{ worker_connections 4096; }}
stream {{ access_log off; server {{ listen 127.0.0.1:{port}; proxy_pass 127.0.0.1:{backend}; }} }}
"""


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def commands(folder: Path, backend: int) -> Iterator[tuple[str, int, list[str]]]:
    """The proxies that this machine has: name, port, command."""
    port = free_port()
    yield (
        "rspd",
        port,
        [
            *(sys.executable, "-m", "rspd", "--foreground", "--log-level", "warning", "--max-connections", "64"),
            *("-l", f"127.0.0.1:{port}", "-b", f"127.0.0.1:{backend}"),
        ],
    )
    nginx = shutil.which("nginx", path=os.environ["PATH"] + ":/usr/sbin")
    if nginx:
        port = free_port()
        modules = list(Path("/usr/lib/nginx/modules").glob("ngx_stream_module.so"))
        module = f"load_module {modules[0]};" if modules else ""
        config = folder / "nginx.conf"
        config.write_text(NGINX_CONFIG.format(folder=folder, module=module, port=port, backend=backend))
        yield "nginx", port, [nginx, "-c", str(config), "-e", "stderr"]
    else:
        print("nginx is not here: apt install nginx libnginx-mod-stream", file=sys.stderr)
    activate = shutil.which("systemd-socket-activate")
    if activate and os.path.exists(SOCKET_PROXYD):
        port = free_port()
        yield "socket-proxyd", port, [activate, "-l", f"127.0.0.1:{port}", SOCKET_PROXYD, f"127.0.0.1:{backend}"]
    else:
        print("systemd-socket-proxyd is not here: apt install systemd", file=sys.stderr)


def cpu_seconds(process: int) -> float:
    """CPU time of a process, its threads and its children, to the nanosecond (proc(5), schedstat)."""
    total = 0.0
    for task in Path(f"/proc/{process}/task").iterdir():
        total += int((task / "schedstat").read_text().split()[0]) / 1e9
        for child in (task / "children").read_text().split():
            total += cpu_seconds(int(child))
    return total


@contextmanager
def running(name: str, port: int, command: list[str], cpu: int) -> Iterator[int]:
    """The proxy's process, pinned to a processor and warm."""
    process = subprocess.Popen(
        command,
        preexec_fn=lambda: os.sched_setaffinity(0, {cpu}),
        stderr=subprocess.DEVNULL,
        cwd=Path(__file__).parent.parent,
    )
    try:
        deadline = time.monotonic() + 10
        while True:
            try:
                connections(port, 50)
                break
            except OSError:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise RuntimeError(f"{name} does not serve") from None
                time.sleep(0.05)
        yield process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(10)


def serve(listener: socket.socket) -> None:
    """The backend: a byte that says what is wanted, then that. One connection at a time."""
    block = os.urandom(CHUNK)
    buffer = bytearray(CHUNK)
    while True:
        sock, _ = listener.accept()
        with sock:
            try:
                wanted = sock.recv(len(REQUEST))
                if wanted.startswith(b"GET"):
                    sock.sendall(ANSWER)
                    sock.recv(1)
                elif wanted.startswith(b"down"):
                    for _ in range(int(wanted[4:]) // CHUNK):
                        sock.sendall(block)
                elif wanted.startswith(b"up"):
                    left = int(wanted[2:]) // CHUNK * CHUNK
                    while left:
                        left -= sock.recv_into(buffer, min(left, CHUNK))
                    sock.sendall(b"done")
            except OSError:
                pass


def connections(port: int, count: int) -> None:
    """Connect, one small request, its answer, close; so many times."""
    for _ in range(count):
        with socket.create_connection(("127.0.0.1", port)) as sock:
            sock.sendall(REQUEST)
            if len(sock.recv(65536)) != len(ANSWER):
                raise OSError("wrong answer")


def parallel_connections(port: int, count: int) -> None:
    """The same, from several processes at once."""
    clients = []
    for _ in range(AT_A_TIME):
        client = os.fork()
        if not client:
            try:
                connections(port, count // AT_A_TIME)
            finally:
                os._exit(0)
        clients.append(client)
    for client in clients:
        os.waitpid(client, 0)


def download(port: int, size: int) -> None:
    """Receive so many bytes from the backend."""
    buffer = bytearray(CHUNK)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall(b"down%d" % size)
        while count := sock.recv_into(buffer):
            size -= count
    assert size <= CHUNK, f"{size} bytes are missing"


def upload(port: int, size: int) -> None:
    """Send so many bytes to the backend, and wait until it has them."""
    block = os.urandom(CHUNK)
    with socket.create_connection(("127.0.0.1", port)) as sock:
        sock.sendall((b"up%d" % size).ljust(len(REQUEST)))
        for _ in range(size // CHUNK):
            sock.sendall(block)
        # No half-close to tell the end: socket-proxyd would close the connection.
        assert sock.recv(4) == b"done"


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--connections", type=int, default=20_000, help="per proxy, over all rounds")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="each way, per round")
    options = parser.parse_args()
    if (os.cpu_count() or 1) < 2:
        sys.exit("two processors are needed, one for the proxy")
    cpus = sorted(os.sched_getaffinity(0))
    each = options.connections // options.rounds
    size = int(options.gigabytes * 1e9)
    works: list[tuple[str, float, Callable[[int], None]]] = [
        ("connection, us", each / 1e6, lambda port: connections(port, each)),
        ("16 at once, us", each // AT_A_TIME * AT_A_TIME / 1e6, lambda port: parallel_connections(port, each)),
        ("download, s/GB", size / 1e9, lambda port: download(port, size)),
        ("upload, s/GB", size / 1e9, lambda port: upload(port, size)),
    ]
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    os.sched_setaffinity(0, cpus[1:])
    backends = []
    for _ in range(AT_A_TIME):
        backends.append(os.fork())
        if not backends[-1]:
            serve(listener)
    figures: dict[tuple[str, str], list[float]] = {}
    with ExitStack() as stack:
        for backend in backends:
            stack.callback(os.kill, backend, signal.SIGKILL)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        proxies = [
            (name, port, stack.enter_context(running(name, port, command, cpus[0])))
            for name, port, command in commands(folder, listener.getsockname()[1])
        ]
        for _ in range(options.rounds):
            for work, units, run in works:
                for name, port, process in proxies:
                    before = cpu_seconds(process)
                    run(port)
                    figures.setdefault((work, name), []).append((cpu_seconds(process) - before) / units)
    print(f"{'CPU time per':16}{'proxy':16}{'median':>9}{'min':>9}{'max':>9}   rspd's share of it")
    for (work, name), values in figures.items():
        middle = statistics.median(values)
        ratio = statistics.median(figures[work, "rspd"]) / middle
        print(f"{work:16}{name:16}{middle:9.2f}{min(values):9.2f}{max(values):9.2f}   {ratio:.2f}")


if __name__ == "__main__":
    main()
