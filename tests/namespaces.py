"""Functions of the tests run with a network and name servers of their own."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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


@contextmanager
def silent_name_server() -> Iterator[socket.socket]:
    """What `SILENT_DNS` makes every name be asked of."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 53))
        server.settimeout(PATIENCE)
        yield server
