"""ClientHellos: real ones, made by programs on the spot, and the ways to cut and to break them."""

from __future__ import annotations

import os
import random
import shutil
import signal
import socket
import ssl
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from itertools import product

from tests.support import PATIENCE

LONG_NAME = ".".join(["x" * 60, "y" * 60, "z" * 60, "two.example"])
NAMES = ("one.example", "TWO.Example", "www.two.example", "example", "under_score.one.example", LONG_NAME, "")
PROTOCOLS = ("", "h2", "h2,http/1.1", "imap")
CHROMIUM = "chromium"


def real() -> dict[str, bytes]:
    """What Python's ssl, openssl, curl and Chromium say first, those that are here; each by what it is called."""
    found = dict(_python())
    if shutil.which("openssl"):
        found |= _openssl()
    if shutil.which("curl"):
        found |= _curl()
    if shutil.which("chromium"):
        found |= _chromium()
    return found


def _python() -> Iterator[tuple[str, bytes]]:
    v = ssl.TLSVersion
    ranges = {"1.0": (v.TLSv1, v.TLSv1), "1.2": (v.TLSv1_2, v.TLSv1_2), "1.3": (v.TLSv1_3, v.TLSv1_3)}
    ranges |= {"usual": (v.TLSv1_2, v.MAXIMUM_SUPPORTED)}
    for (version, (least, most)), name, protocols in product(ranges.items(), NAMES, PROTOCOLS):
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of old versions
            context.minimum_version, context.maximum_version = least, most
        context.set_ciphers("DEFAULT:@SECLEVEL=0")
        if protocols:
            context.set_alpn_protocols(protocols.split(","))
        sent = ssl.MemoryBIO()
        try:
            context.wrap_bio(ssl.MemoryBIO(), sent, server_hostname=name or None).do_handshake()
        except ssl.SSLWantReadError:
            yield f"python {version} {name} {protocols}", sent.read()


def _openssl() -> dict[str, bytes]:
    commands = {}
    for version, name, protocols in product(("-tls1_2", "-tls1_3", "-no_ticket"), NAMES, ("", "h2,http/1.1")):
        words = ["-servername", name] if name else ["-noservername"]
        words += ["-alpn", protocols] if protocols else []
        commands[f"openssl {version} {name} {protocols}"] = ["openssl", "s_client", version, *words, "-connect", "@"]
    return {called: heard for called, words in commands.items() for heard in [_said(words)]}


def _curl() -> dict[str, bytes]:
    options = {"http1.1": ["--http1.1"], "http2": ["--http2"], "tls1.2": ["--tls-max", "1.2"]}
    made = {}
    for (called, words), name in product(options.items(), ("one.example", "www.two.example", "example")):
        there = ["--noproxy", "*", "--connect-to", "::@", f"https://{name}/"]
        made[f"curl {called} {name}"] = _said(["curl", "-sk", *words, *there])
    return made


def _chromium() -> dict[str, bytes]:
    """Its hello has more than a segment of most networks holds, and extensions in an order that changes."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-proxy-server"]
        quiet += ["--disable-background-networking", "--no-first-run", f"--user-data-dir={folder}", "--dump-dom"]
        return {
            CHROMIUM: _said(
                [
                    "chromium",
                    *quiet,
                    "--host-resolver-rules=MAP www.two.example @, MAP * ~NOTFOUND",
                    "https://www.two.example/",
                ]
            )
        }


def _said(command: Sequence[str]) -> bytes:
    """The first record that a client sends, which is told by `@` in its command where to connect."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(PATIENCE)
        words = [word.replace("@", f"127.0.0.1:{listener.getsockname()[1]}") for word in command]
        with subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True
        ) as client:
            assert client.stdout
            try:
                server, _ = listener.accept()
                with server:
                    server.settimeout(PATIENCE)
                    head = server.recv(5, socket.MSG_WAITALL)
                    return head + server.recv(struct.unpack("!H", head[3:])[0], socket.MSG_WAITALL)
            finally:
                os.killpg(client.pid, signal.SIGKILL)
                client.stdout.read()  # ends with the last of its processes: then nobody writes into its folder


# ------------------------------------------------------------------ cut


def records(hello: bytes, size: int) -> bytes:
    """The same handshake message in records of so many bytes."""
    body = hello[5:]
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(hello[:3] + struct.pack("!H", len(part)) + part for part in parts)


def segments(hello: bytes, size: int) -> list[bytes]:
    """The same bytes in segments of so many."""
    return [hello[at : at + size] for at in range(0, len(hello), size)]


# ------------------------------------------------------------------ made by hand, and broken


def server_name(name: bytes, kind: int = 0) -> bytes:
    """The body of the extension."""
    entry = struct.pack("!BH", kind, len(name)) + name
    return struct.pack("!H", len(entry)) + entry


def made(
    *extensions: tuple[int, bytes], session: bytes = b"", suites: bytes = b"\x13\x01\xc0\x2f", methods: bytes = b"\0"
) -> bytes:
    """A ClientHello with these extensions."""
    listed = b"".join(struct.pack("!HH", kind, len(body)) + body for kind, body in extensions)
    fields = b"\3\3" + bytes(32) + bytes([len(session)]) + session
    fields += struct.pack("!H", len(suites)) + suites + bytes([len(methods)]) + methods
    fields += struct.pack("!H", len(listed)) + listed if extensions else b""
    message = b"\1" + len(fields).to_bytes(3, "big") + fields
    return b"\x16\3\1" + struct.pack("!H", len(message)) + message


def broken(hello: bytes, seed: int = 20) -> dict[str, bytes]:
    """Hellos that are not as they should be, made by hand or from a real one. Some may be valid all the same."""
    one, two = (0, server_name(b"one.example")), (0, server_name(b"two.example"))
    both = server_name(b"one.example")[2:] + server_name(b"two.example")[2:]
    found = {
        "two extensions": made(one, two),
        "two names": made((0, struct.pack("!H", len(both)) + both)),
        "a name of another type": made((0, server_name(b"one.example", 1))),
        "an empty name": made((0, server_name(b""))),
        "an empty list": made((0, b"\0\0")),
        "an empty extension": made((0, b"")),
        "a name with a null byte": made((0, server_name(b"one.example\0.two.example"))),
        "a name with a blank": made((0, server_name(b"one.example "))),
        "a name with a line end": made((0, server_name(b"one.example\r\n"))),
        "a name that is an address": made((0, server_name(b"127.0.0.1"))),
        "two dots": made((0, server_name(b"one..example"))),
        "bytes after the name": made((0, server_name(b"one.example") + b"x")),
        "a long session id": made(one, session=bytes(33)),
        "no suites": made(one, suites=b""),
        "half a suite": made(one, suites=b"\x13"),
        "no methods": made(one, methods=b""),
        "an extension of the wrong length": made(one)[:-1] + b"ee",
        "a broken list of protocols": made(one, (16, b"\0\5\2h2")),
        "an empty list of protocols": made(one, (16, b"\0\0")),
        "padding of 15 KiB": made(one, (21, bytes(15 * 1024))),
        "a hello of more than 16 KiB": _large(one),
        "a record of type 23": b"\x17" + made(one)[1:],
        "a record of version 2": b"\x16\2" + made(one)[2:],
        "a server's hello": made(one)[:5] + b"\2" + made(one)[6:],
        "an alert before it": b"\x15\3\1\0\2\1\0" + made(one),
        "an alert within it": records(made(one), 20)[:25] + b"\x15\3\1\0\2\1\0" + records(made(one), 20)[25:],
        "an empty record before it": b"\x16\3\1\0\0" + made(one),
        "a hello of SSL 2": b"\x80\x2e\1\3\1\0\x15\0\0\0\x10" + bytes(37),
    }
    chance = random.Random(seed)
    for at in range(1, len(hello), max(1, len(hello) // 40)):
        found[f"cut after {at} bytes"] = hello[:at]
    for _ in range(300):
        at, value = chance.randrange(min(len(hello), 300)), chance.randrange(256)
        found[f"byte {at} is {value}"] = hello[:at] + bytes([value]) + hello[at + 1 :]
    for _ in range(100):
        at, count = chance.randrange(5, len(hello) - 8), chance.randrange(1, 8)
        found[f"{count} bytes at {at} are missing"] = hello[:at] + hello[at + count :]
    return found


def _large(extension: tuple[int, bytes]) -> bytes:
    """A ClientHello of more than 16 KiB, in records of 4 KiB; its name comes last."""
    listed = [(21, bytes(9000)), (0xFAFA, bytes(9000)), extension]
    body = b"".join(struct.pack("!HH", kind, len(one)) + one for kind, one in listed)
    fields = b"\3\3" + bytes(32) + b"\0\0\2\x13\1\1\0" + struct.pack("!H", len(body)) + body
    message = b"\1" + len(fields).to_bytes(3, "big") + fields
    return records(b"\x16\3\1\0\0" + message, 4096)
