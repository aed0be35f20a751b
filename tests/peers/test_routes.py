"""One port for two https sites, an http site and SSH: real clients come to the right server through rspd."""

from __future__ import annotations

import getpass
import os
import pwd
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.handover.programs import AS_USER, USER
from tests.peers.programs import listening, nginx
from tests.support import PATIENCE, Daemon, eventually, free_port, rspd

SITE = """http {
    access_log off;
    server {
        listen 127.0.0.1:@PORT@ ssl http2;
        ssl_protocols TLSv1.2 TLSv1.3;
        ssl_certificate %(folder)s/%(name)s.pem;
        ssl_certificate_key %(folder)s/%(name)s.key;
        default_type text/plain;
        return 200 "%(name)s, asked for $host by $server_protocol\\n";
    }
}
"""

PLAIN = """http {
    access_log off;
    server {
        listen 127.0.0.1:@PORT@;
        default_type text/plain;
        return 200 "plain, asked for $host by $server_protocol\\n";
    }
}
"""

SSHD = """
ListenAddress 127.0.0.1:{port}
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile none
UsePAM no
# The folder is in /tmp, where everybody may write.
StrictModes no
"""

ROUTES = """
max_connections: 50
routes:
  - {{server_name: one.example, backend: "127.0.0.1:{one}"}}
  - {{server_name: [two.example, "*.two.example"], backend: "127.0.0.1:{two}"}}
  - {{host: [plain.example, "*.plain.example"], backend: "127.0.0.1:{plain}"}}
  - {{protocol: ssh, backend: "127.0.0.1:{ssh}"}}
"""


@dataclass
class Place:
    """rspd with what is behind it. folder: has the certificates, as NAME.pem. ssh: the port of an SSH server."""

    daemon: Daemon
    folder: Path
    ssh: int

    def url(self, scheme: str, name: str) -> str:
        return f"{scheme}://{name}:{self.daemon.port}/"

    def last(self, count: int) -> dict[str, str]:
        """The fields of the line of the latest connection, once so many have ended."""
        return self.daemon.wait_for_ends(count)[count - 1]


def needed(*programs: str) -> None:
    """Skip the test if a program is not there. Each is called as its package, but for those of SSH."""
    packages = {"ssh": "openssh-client", "/usr/sbin/sshd": "openssh-server", "ssh-keygen": "openssh-client"}
    missing = [packages.get(name, name) for name in programs if not shutil.which(name)]
    if missing:
        pytest.skip(f"programs are not there: apt install {' '.join(missing)}")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the certificates and keys of the two sites."""
    needed("openssl")
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("one", "two"):
        made = [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "2",
        ]
        names = f"subjectAltName=DNS:{name}.example,DNS:*.{name}.example"
        files = ["-keyout", f"{folder}/{name}.key", "-out", f"{folder}/{name}.pem"]
        run = subprocess.run([*made, "-subj", f"/CN={name}.example", "-addext", names, *files], capture_output=True)
        assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture
def place(certificates: Path, tmp_path: Path) -> Iterator[Place]:
    """rspd in front of all of them. Nobody listens at the port of the SSH server, unless the test starts one."""
    with ExitStack() as stack:
        ports = {
            name: stack.enter_context(nginx(SITE % {"folder": certificates, "name": name})) for name in ("one", "two")
        }
        ports["plain"] = stack.enter_context(nginx(PLAIN))
        ports["ssh"] = free_port()
        file = tmp_path / "rspd.yaml"
        file.write_text(ROUTES.format(**ports))
        daemon = stack.enter_context(rspd("-c", str(file)))
        yield Place(daemon, certificates, ports["ssh"])


def run(*command: object, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """A client, to its end."""
    words = list(map(str, command))
    # What a server of HTTP/2 says first is no text.
    return subprocess.run(
        words, input=stdin, capture_output=True, encoding="utf-8", errors="replace", timeout=2 * PATIENCE, check=False
    )


# ------------------------------------------------------------------ curl


def curl(place: Place, scheme: str, name: str, *options: object) -> subprocess.CompletedProcess[str]:
    needed("curl")
    there = ["--resolve", f"{name}:{place.daemon.port}:127.0.0.1", "--noproxy", "*"]
    return run("curl", "-sS", "--max-time", PATIENCE, *there, *options, place.url(scheme, name))


@pytest.mark.parametrize("version", ["1.1", "2"])
@pytest.mark.parametrize(("name", "site"), [("one.example", "one"), ("two.example", "two"), ("www.two.example", "two")])
def test_curl_comes_to_the_site_whose_certificate_it_trusts(place: Place, name: str, site: str, version: str) -> None:
    end = curl(place, "https", name, f"--http{version}", "--cacert", place.folder / f"{site}.pem")
    protocol = {"1.1": "HTTP/1.1", "2": "HTTP/2.0"}[version]
    assert (end.stdout, end.returncode) == (f"{site}, asked for {name} by {protocol}\n", 0), end.stderr
    line = place.last(1)
    assert (line["name"], line["protocol"]) == (f'"{name}"', "tls")


@pytest.mark.parametrize("name", ["plain.example", "PLAIN.example", "www.plain.example"])
def test_curl_comes_to_the_site_of_its_host(place: Place, name: str) -> None:
    end = curl(place, "http", name)
    assert end.stdout == f"plain, asked for {name.lower()} by HTTP/1.1\n", end.stderr
    line = place.last(1)
    assert (line["name"], line["protocol"]) == (f'"{name.lower()}"', "http")


def test_curl_is_told_by_an_alert_that_nobody_has_the_name(place: Place) -> None:
    end = curl(place, "https", "three.example")
    assert end.returncode == 35
    assert "unrecognized name" in end.stderr
    assert place.last(1)["cause"] == "no-route"


def test_curl_gets_a_page_if_nobody_has_the_host(place: Place) -> None:
    end = curl(place, "http", "three.example", "-w", "%{http_code}")
    assert end.returncode == 0, end.stderr
    assert end.stdout.endswith("404")
    assert place.last(1)["cause"] == "no-route"


# ------------------------------------------------------------------ openssl


def s_client(place: Place, *options: object) -> subprocess.CompletedProcess[str]:
    needed("openssl")
    return run("openssl", "s_client", "-connect", f"127.0.0.1:{place.daemon.port}", *options)


@pytest.mark.parametrize("version", ["tls1_2", "tls1_3"])
@pytest.mark.parametrize("site", ["one", "two"])
@pytest.mark.parametrize("protocol", ["", "h2", "http/1.1"])
def test_openssl_speaks_with_the_site_itself(place: Place, version: str, site: str, protocol: str) -> None:
    options = [f"-{version}", "-servername", f"{site}.example", *(["-alpn", protocol] if protocol else [])]
    end = s_client(place, *options, "-CAfile", place.folder / f"{site}.pem", "-verify_return_error")
    assert end.returncode == 0, end.stderr
    assert re.search(rf"subject=CN ?= ?{site}\.example", end.stdout)
    assert (f"ALPN protocol: {protocol}" if protocol else "No ALPN negotiated") in end.stdout
    assert f"New, {version.replace('tls', 'TLSv').replace('_', '.')}, Cipher is" in end.stdout


@pytest.mark.parametrize("version", ["tls1_2", "tls1_3"])
def test_openssl_without_a_server_name_is_told_so(place: Place, version: str) -> None:
    end = s_client(place, f"-{version}", "-noservername")
    assert end.returncode != 0
    assert "unrecognized name" in end.stderr
    line = place.last(1)
    assert (line["cause"], line["protocol"]) == ("no-route", "tls")


# ------------------------------------------------------------------ SSH


@contextmanager
def ssh_server(port: int) -> Iterator[tuple[str, Path]]:
    """An SSH server. Yields the user who may log in, and the file with his key.

    As root, sshd wants folders of the host's: so it runs as another user.
    """
    needed("ssh", "/usr/sbin/sshd", "ssh-keygen")
    user, prefix = getpass.getuser(), []
    if os.geteuid() == 0:
        user, prefix = USER, AS_USER
        try:
            pwd.getpwnam(USER)
        except KeyError:
            pytest.skip(f"no user {USER}: apt install postgresql")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.chown(folder, user)
        for key in ("host", "user"):
            subprocess.run([*prefix, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
        file = folder / "sshd"
        file.write_text(SSHD.format(port=port, folder=folder))
        file.chmod(0o644)
        with open(folder / "output", "w+") as output:
            command = [*prefix, "/usr/sbin/sshd", "-D", "-e", "-f", str(file)]
            server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=folder)
            try:
                eventually(lambda: server.poll() is not None or listening(port), "sshd listens")
                assert server.poll() is None, (folder / "output").read_text()
                yield user, folder / "user"
            finally:
                server.kill()
                server.wait(PATIENCE)


def test_ssh_runs_a_command_at_the_port_of_the_sites(place: Place) -> None:
    with ssh_server(place.ssh) as (user, key):
        options = ["BatchMode=yes", "LogLevel=ERROR", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
        words = ["-F", "none", "-i", key, "-p", place.daemon.port, *(f"-o{option}" for option in options)]
        end = run("ssh", *words, f"{user}@127.0.0.1", "cat; echo there", stdin="hello ")
    assert (end.stdout, end.returncode) == ("hello there\n", 0), end.stderr
    line = place.last(1)
    assert line["protocol"] == "ssh"
    assert line["backend"] == f"127.0.0.1:{place.ssh}"


# ------------------------------------------------------------------ Chromium


def dom(place: Place, scheme: str, name: str, tmp_path: Path) -> str:
    """The page that Chromium shows."""
    needed("chromium")
    quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"]
    quiet += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={tmp_path / 'chromium'}"]
    there = ["--host-resolver-rules=MAP * 127.0.0.1", "--ignore-certificate-errors"]
    end = run("chromium", *quiet, *there, "--dump-dom", place.url(scheme, name))
    assert end.returncode == 0, end.stderr
    return end.stdout


@pytest.mark.parametrize(
    ("scheme", "name", "shown"),
    [
        ("http", "plain.example", "plain, asked for plain.example by HTTP/1.1"),
        ("https", "one.example", "one, asked for one.example by HTTP/2.0"),
        ("https", "www.two.example", "two, asked for www.two.example by HTTP/2.0"),
        ("http", "three.example", "There is no such site here."),
    ],
)
def test_chromium_shows_the_site_or_that_there_is_none(
    place: Place, tmp_path: Path, scheme: str, name: str, shown: str
) -> None:
    assert shown in dom(place, scheme, name, tmp_path)
    # It opens connections before it knows what it needs, and closes those that it did not need.
    place.daemon.wait_for(f'connection closed.* name="{re.escape(name)}"')
