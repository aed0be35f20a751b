"""Functions of the tests run with a network and name servers of their own."""

from __future__ import annotations

import shutil
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from tests.support import PATIENCE, skip_for_kernel

REPOSITORY = Path(__file__).resolve().parent.parent

UNSHARE = ["unshare", "-rnm", "sh", "-ec"]

# A name server that gets questions and never answers.
SILENT_DNS = """
folder=$(mktemp -d)
mount -t tmpfs tmpfs "$folder"
echo 'nameserver 127.0.0.1' >"$folder/resolv.conf"
echo 'hosts: files dns' >"$folder/nsswitch.conf"
mount --bind "$folder/resolv.conf" /etc/resolv.conf
mount --bind "$folder/nsswitch.conf" /etc/nsswitch.conf
umount -l "$folder"
rmdir "$folder"
"""


def in_namespace(function: Callable[..., None], *arguments: str, prepare: str = "") -> list[str]:
    """The lines that a function of a test module prints with a loopback of its own; skips where that cannot be had."""
    for program, package in (("unshare", "util-linux"), ("ip", "iproute2")):
        if not shutil.which(program):
            pytest.skip(f"{program} is not here: apt install {package}")
    inside = [*UNSHARE, f'ip link set lo up\n{prepare}\nexec "$@"', "sh"]
    possible = subprocess.run([*inside, "true"], capture_output=True, text=True, check=False)
    if possible.returncode:
        skip_for_kernel(f"no namespaces of our own ({possible.stderr.strip()})")
    code = f"import sys, {function.__module__} as module; module.{function.__name__}(*sys.argv[1:])"
    command = [*inside, sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPOSITORY, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


# For `name_server`: one question each, without a long wait for an answer that does not come.
OWN_DNS = f"{SILENT_DNS}\necho 'options timeout:1 attempts:1' >>/etc/resolv.conf\n"

# RFC 1035, 4.1.1, and the types of questions (RFC 1035, 3.2.2, and RFC 3596).
HEADER = struct.Struct(">6H")
TYPES = {1: socket.AF_INET, 28: socket.AF_INET6}
CODES = {"NODATA": 0, "SERVFAIL": 2, "NXDOMAIN": 3, "REFUSED": 5}


@contextmanager
def name_server(answers: Mapping[int, str]) -> Iterator[None]:
    """A name server at 127.0.0.1 that says by family: one of `CODES`, an address, or nothing at all if it is empty."""

    def serve() -> None:
        while not ended.is_set():
            with suppress(TimeoutError):
                question, client = server.recvfrom(512)
                (kind,) = struct.unpack(">H", question[-4:-2])
                if said := answers[TYPES[kind]]:
                    server.sendto(_answer(question, said), client)

    ended = threading.Event()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        server.settimeout(0.05)
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join(PATIENCE)


def _answer(question: bytes, said: str) -> bytes:
    record = b""
    if said not in CODES:
        # The name is that of the question; one address of class IN, for no time.
        record = struct.pack(">HHHIH4s", 0xC00C, 1, 1, 0, 4, socket.inet_aton(said.partition(":")[0]))
    (number,) = struct.unpack(">H", question[:2])
    head = HEADER.pack(number, 0x8180 | CODES.get(said, 0), 1, bool(record), 0, 0)
    return head + question[HEADER.size :] + record


@contextmanager
def silent_name_server() -> Iterator[socket.socket]:
    """What `SILENT_DNS` makes every name be asked of."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        server.settimeout(PATIENCE)
        yield server
