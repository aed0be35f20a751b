"""Real machines for the tests: root trees, kept between runs, and booted copies of them that leave no trace."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support import eventually

# With what rspd depends on, and what it suggests: machines have no network.
PACKAGES = (
    "apt,systemd,systemd-sysv,dbus,iproute2,python3,python3-daemon,python3-prometheus-client,python3-sdnotify,"
    "python3-yaml"
)
COMPONENTS = {"Debian": "main", "Ubuntu": "main,universe"}
KEYRING = "/usr/share/keyrings/{}-archive-keyring.gpg"

# What has changed is kept in memory, in a mount namespace of its own: it all goes with the last process.
BOOT = """
set -e
tree=$1 name=$2; shift 2
for folder; do mkdir "$folder"; echo $$ > "$folder/cgroup.procs"; done
mount -t tmpfs tmpfs /run
mkdir /run/upper /run/work /run/root
mount -t overlay -o "lowerdir=$tree,upperdir=/run/upper,workdir=/run/work" overlay /run/root
export SYSTEMD_NSPAWN_UNIFIED_HIERARCHY=1
exec systemd-nspawn --quiet --directory=/run/root --machine="$name" --boot --register=no --keep-unit \\
    --private-network --resolv-conf=off --timezone=off --link-journal=no --console=read-only
"""

# Whatever happens to the tests, all that is started by this ends, and its mounts too.
BOUND = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]

ENVIRONMENT = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}

CLONE_NEWNET = 0x40000000


class NoMachineError(Exception):
    """There can be no machine here; the text says why, and what to do."""


def check_host() -> None:
    """Raise NoMachineError if this host cannot run machines at all."""
    if os.geteuid():
        raise NoMachineError("machines need root")
    for program, package in (("systemd-nspawn", "systemd-container"), ("mmdebstrap", "mmdebstrap")):
        if not shutil.which(program):
            raise NoMachineError(f"{program} is not there: apt install {package}")
    trial = subprocess.run([*BOUND, "mount", "-t", "tmpfs", "tmpfs", "/run"], capture_output=True, text=True)
    if trial.returncode:
        raise NoMachineError(f"this host lets nobody mount: {trial.stderr.strip()}")


# ------------------------------------------------------------------ root trees


def root_tree(suite: str) -> Path:
    """The root tree of a suite, made if there is none yet. Raises NoMachineError."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = Path(os.environ.get("RSPD_MACHINES") or cache / "rspd" / "machines").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    tree = folder / f"{suite}-{hashlib.sha256(PACKAGES.encode()).hexdigest()[:8]}"
    with open(f"{tree}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not tree.exists():
            archive, origin = find_archive(suite)
            unfinished = Path(f"{tree}.new")
            shutil.rmtree(unfinished, ignore_errors=True)
            _make_tree(unfinished, suite, archive, COMPONENTS[origin])
            unfinished.rename(tree)
    return tree


def _make_tree(tree: Path, suite: str, archive: str, components: str) -> None:
    options = ["--quiet", "--variant=minbase", f"--include={PACKAGES}", f"--components={components}"]
    command = [*BOUND, "mmdebstrap", *options, suite, str(tree), archive]
    made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if made.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {made.returncode}:\n{made.stderr}")


def find_archive(suite: str) -> tuple[str, str]:
    """An archive that has a suite, and its origin: MIRROR, what apt uses here, or the other distribution beside it."""
    targets = ["apt-get", "indextargets", "--no-release-info", "--format", "$(REPO_URI)", "Created-By: Packages"]
    own = subprocess.run(targets, capture_output=True, text=True, check=True).stdout.split()
    candidates = dict.fromkeys(uri.rstrip("/") for uri in [*os.environ.get("MIRROR", "").split(), *own])
    beside = [uri.rpartition("/")[0] + f"/{name.lower()}" for uri in candidates for name in COMPONENTS]
    tried = list(dict.fromkeys([*candidates, *beside]))
    for uri in tried:
        origin = _origin(uri, suite)
        if origin in COMPONENTS:
            keyring = Path(KEYRING.format(origin.lower()))
            if not keyring.exists():
                raise NoMachineError(f"{keyring} is not there, to check {suite} with: apt install {keyring.stem}")
            return uri, origin
    raise NoMachineError(f"no archive with {suite} can be reached, tried {' '.join(tried)}; MIRROR=URI names another")


def _origin(uri: str, suite: str) -> str:
    """Whose suite an archive has, empty for none."""
    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder, "InRelease")
        options = ["-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10", "-o", "Acquire::https::Timeout=10"]
        command = ["/usr/lib/apt/apt-helper", *options, "download-file", f"{uri}/dists/{suite}/InRelease", str(release)]
        subprocess.run(command, capture_output=True)
        lines = release.read_text().splitlines() if release.exists() else []
    fields = dict(line.split(": ", 1) for line in lines[:20] if ": " in line)
    return fields.get("Origin", "") if suite in (fields.get("Codename"), fields.get("Suite")) else ""


# ------------------------------------------------------------------ a machine


class Machine:
    """A booted copy of a root tree. While it runs, this thread and those that it starts are in its network."""

    def __init__(self, suite: str) -> None:
        self.suite = suite
        tree = root_tree(suite)
        name = f"rspd-{suite}-{os.getpid()}-{time.monotonic_ns()}"
        self._groups = [folder / name for folder in _control_groups()]
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process = subprocess.Popen(
            [*BOUND, "sh", "-c", BOOT, "boot", str(tree), name, *map(str, self._groups)],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the tests
        )
        self.cursor = ""
        self._home = os.open("/proc/self/ns/net", os.O_RDONLY)
        try:
            self.leader = eventually(self._find_leader, "the machine boots")
            state = self.run("systemctl", "is-system-running", "--wait", check=False).stdout.strip()
            assert state == "running", f"{state}:\n{self.run('systemctl', '--failed').stdout}"
            with open(f"/proc/{self.leader}/ns/net") as network:
                _enter_network(network.fileno())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the machine; nothing of it is left."""
        _enter_network(self._home)
        os.close(self._home)
        if self._process.poll() is None:
            # nspawn, if it runs already, is the first process of its namespace: all others end with it.
            for pid in _children(self._process.pid) or [self._process.pid]:
                os.kill(pid, signal.SIGKILL)
        self._process.wait()
        self._output.close()
        for group in self._groups:
            eventually(lambda group=group: _removed(group), f"{group} is empty")  # type: ignore[misc]

    def _find_leader(self) -> int:
        """The machine's first process, 0 until it can be talked to."""
        if self._process.poll() is not None:
            self._output.seek(0)
            raise RuntimeError(f"the machine did not boot:\n{self._output.read()}")
        booted = Path("root/run/systemd/private")
        inside = [pid for nspawn in _children(self._process.pid) for pid in _children(nspawn)]
        return next((pid for pid in inside if Path(f"/proc/{pid}", booted).exists()), 0)

    def command(self, *words: str) -> list[str]:
        """A command of the host that runs a command inside."""
        environment = [f"{name}={value}" for name, value in ENVIRONMENT.items()]
        return ["nsenter", "-t", str(self.leader), "-a", "--", "env", "-i", *environment, *words]

    def run(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a command inside. Unless `check` is false, it must succeed."""
        command = self.command(*words)
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
        assert not check or done.returncode == 0, f"{words} ended with {done.returncode}:\n{done.stdout}{done.stderr}"
        return done

    def shell(self, script: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a shell script inside."""
        return self.run("sh", "-c", script, check=check)

    def systemctl(self, *words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Ask the machine's systemd."""
        return self.run("systemctl", "--no-pager", "--full", *words, check=check)

    def show(self, name: str, unit: str = "rspd") -> str:
        """A property of a unit."""
        return self.systemctl("show", "--value", "-p", name, unit).stdout.strip()

    def pid(self, unit: str = "rspd") -> int:
        """The main process of a service, by its number inside."""
        return int(self.show("MainPID", unit))

    def path(self, path: str) -> Path:
        """A path inside, as seen from here. A symbolic link to an absolute path would lead out."""
        return Path(f"/proc/{self.leader}/root", path.lstrip("/"))

    def write(self, path: str, text: str) -> None:
        """Write a file inside."""
        self.path(path).parent.mkdir(parents=True, exist_ok=True)
        self.path(path).write_text(text)

    def drop_in(self, unit: str, text: str) -> None:
        """Add to a unit."""
        self.write(f"/etc/systemd/system/{unit}.d/test.conf", text + "\n")
        self.systemctl("daemon-reload")

    def install(self, deb: Path, *options: str) -> str:
        """Install a package, or upgrade to it; what is said meanwhile."""
        shutil.copy(deb, self.path("/root"))
        done = self.run("apt-get", "install", "-y", *options, f"/root/{deb.name}")
        return done.stdout + done.stderr

    def journal(self) -> list[dict[str, Any]]:
        """The entries of the journal since the last `mark`, complete up to now."""
        self.run("journalctl", "--sync")
        # Without other filters: with one, systemd 252 leaves out the first entry after a cursor.
        after = [f"--after-cursor={self.cursor}"] if self.cursor else []
        lines = self.run("journalctl", "--quiet", "--all", "--output=json", *after).stdout.splitlines()
        return [json.loads(line) for line in lines]

    def mark(self) -> None:
        """Let the journal begin here."""
        self.cursor = self.journal()[-1]["__CURSOR"]

    def entries(self) -> list[dict[str, Any]]:
        """What rspd has logged since the last `mark`."""
        return [entry for entry in self.journal() if entry.get("SYSLOG_IDENTIFIER") == "rspd"]

    def log(self, pattern: str = "") -> list[str]:
        """The messages of rspd since the last `mark` that match."""
        return [entry["MESSAGE"] for entry in self.entries() if re.search(pattern, entry["MESSAGE"])]


@contextmanager
def booted(suite: str) -> Iterator[Machine]:
    """A machine that ends with the block."""
    machine = Machine(suite)
    try:
        yield machine
    finally:
        machine.close()


def _children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _enter_network(fd: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def _control_groups() -> Sequence[Path]:
    """Where groups for machines are made: two machines in one group would stop each other's services.

    That is our own group in the unified hierarchy, and in systemd's own if there is one: nspawn uses both.
    """
    own = dict(line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines())
    found = []
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, kind, options = line.split()[:4]
        if kind == "cgroup2" or (kind == "cgroup" and "name=systemd" in options.split(",")):
            found.append(Path(point + own["" if kind == "cgroup2" else "name=systemd"]))
    for left in [left for folder in found for left in folder.glob("rspd-*-*-*")]:
        if not Path("/proc", left.name.split("-")[2]).exists():
            _removed(left)  # of tests that were killed
    return found


def _removed(group: Path) -> bool:
    """Remove a control group with those in it; whether it is gone."""
    for folder, _, _ in os.walk(group, topdown=False):
        try:
            os.rmdir(folder)
        except OSError:
            return False
    return not group.exists()
