"""Addresses as people write them: in the file, after an option, or as two or three words."""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence

from rspd.config.values import OFF, ON, accepts
from rspd.net.address import PASSED, Address

# What can be dialled, and what can be listened on.
DIALLED = "HOST:PORT, [IPV6]:PORT, /PATH or @NAME"
FORMS = "PORT, HOST:PORT, [IPV6]:PORT, /PATH, @NAME or fd://NAME"

# sun_path holds 108 bytes, one of them the terminating or the leading null byte (unix(7)).
UNIX_NAME_MAX = 107


def parse_address(text: str, dialled: bool = False) -> Address:
    """Read an address to listen on, or to dial; a port is a number or a service name.

    Raises ValueError, which names the forms that are expected, and what was probably meant.
    """
    if text.startswith(("/", "@")):
        # After a blank or a comma, `/` or `@` more likely begins a second address.
        if len(text) < 2 or "\0" in text or re.search(r"[\s,][/@]", text):
            raise _no_address(text, dialled)
        try:
            length = len(text.encode(errors="surrogateescape")) - text.startswith("@")
        except UnicodeError:
            raise _no_address(text, dialled) from None
        if length > UNIX_NAME_MAX:
            raise ValueError(f"a unix socket's name holds at most {UNIX_NAME_MAX} bytes, found {text!r}")
        return Address(path=text)
    if text.startswith(PASSED):
        name = text.removeprefix(PASSED)
        # What systemd.socket(5) allows in FileDescriptorName=.
        if not 0 < len(name) < 256 or ":" in name or not (name.isascii() and name.isprintable()):
            raise _no_address(text, dialled)
        return Address(passed=name)
    host, colon, port = text.rpartition(":")
    if "://" in text:
        raise _no_address(text, dialled)
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if not _is_ipv6(host):
            raise ValueError(f"expected an IPv6 address between the brackets, found {text!r}")
    elif ":" in host:
        forms = (text, host, text.removeprefix("[").removesuffix("]"))  # without brackets, or without a port after them
        if any(_is_ipv6(form.partition("%")[0]) for form in forms):
            raise ValueError(f"expected brackets around an IPv6 address, as in [::1]:8080, found {text!r}")
        raise _no_address(text, dialled)
    elif colon:
        host = _parse_host(host, text, dialled)
    return Address(host, _parse_port(port, text, dialled))


def parse_path(text: str) -> Address:
    """The path of a unix socket to listen on. Raises ValueError."""
    if not text.startswith("/"):
        raise ValueError(f"expected the path of a unix socket, as /run/rspd/control.sock, or off, found {text!r}")
    return parse_address(text)


def parse_place(text: str) -> Address:
    """Where metrics are served: an address to listen on, which is neither from systemd nor an abstract name."""
    # A word alone, as `on`, would be the port of a service of that name; it is a mistake.
    address = Address() if text.isalpha() else parse_address(text)
    if address.passed or address.path.startswith("@") or not (address.path or address.port):
        raise ValueError(f"expected HOST:PORT, as 127.0.0.1:9114, or /PATH, or off, found {text!r}")
    return address


def parse_backend(text: str) -> Address:
    """An address that can be dialled. Raises ValueError."""
    address = parse_address(text, dialled=True)
    if not address.path and not (address.host and address.port):
        raise _no_address(text, dialled=True)
    return address


def parse_target(text: str) -> Address:
    """An address that can be dialled, or a host alone: its port, 0 here, stands elsewhere. Raises ValueError."""
    host = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    if _is_ipv6(host):
        return Address(host)
    if text.startswith(("/", "@")) or ":" in text:
        return parse_backend(text)
    # YAML's words for a switch, or for nothing, are no names of hosts.
    if not accepts(parse_backend, f"{text}:1") or text.lower() in (*OFF, *ON, "null"):
        advice = f"; a port alone is port: {text}" if text.isdigit() else ""
        raise ValueError(f"expected HOST, {DIALLED}, found {text!r}{advice}")
    return Address(parse_backend(f"{text}:1").host)


def parse_pair(words: Sequence[str]) -> tuple[Address, Address]:
    """Where to listen and what to dial, by two words, or by three: a port, a host and its port. Raises ValueError."""
    if len(words) == 2:
        return parse_address(words[0]), parse_backend(words[1])
    port, host, backend_port = words
    if host.startswith(("/", "@")):
        raise ValueError(f"expected a host, found {host!r}; a unix socket has no port")
    if accepts(parse_backend, host):
        raise ValueError(f"expected a host without a port, found {host!r}; several backends are -b {host} -b ...")
    host = f"[{host}]" if ":" in host and not host.startswith("[") else host
    return parse_address(port), parse_backend(f"{host}:{backend_port}")


def _no_address(text: str, dialled: bool, reason: str = "") -> ValueError:
    """The error for a text that is no address: what was expected, and what was probably meant."""
    return ValueError(f"expected {DIALLED if dialled else FORMS}{reason}, found {text!r}{_advise(text, dialled)}")


def _advise(text: str, dialled: bool) -> str:
    """How to write what other programs write in another way; empty where that is not known."""
    if match := re.fullmatch(r"unix:(?://)?(/.+)", text):
        return f"; a unix socket is its path: {match[1]}"
    if match := re.fullmatch(r"([a-z][a-z0-9+.-]*)://([^/?#]+)(.*)", text, re.ASCII | re.IGNORECASE | re.DOTALL):
        scheme, address, path = match.groups()
        if scheme.lower() == "fd":
            return ""
        address = address.rpartition("@")[2]
        if not re.search(r":\w+$", address):
            address += {"http": ":80", "https": ":443"}.get(scheme.lower(), ":PORT")
        return f"; write {address} without {scheme}://" + (" and path" if path else "")
    if match := re.fullmatch(r"(?:\*|0)?:?([1-9]\d*)", text, re.ASCII):
        if dialled:
            return f"; port {match[1]} of this host is 127.0.0.1:{match[1]}"
        return f"; a port alone is every address: {match[1]}"
    host = re.fullmatch(r"localhost|\d+(\.\d+){3}|[\w-]+(\.[\w-]+)*\.[a-z]{2,}\.?", text, re.ASCII | re.IGNORECASE)
    if host or (dialled and re.fullmatch(r"(?![\d.]+$)\w[\w.-]*", text, re.ASCII)):
        return f"; the port is missing, as in {text}:80"
    if text.startswith("-"):
        return "; a space belongs after the dash"
    number = text.rpartition(":")[0]
    return f"; {number} is no host" if number.isdigit() else ""


def _parse_host(host: str, text: str, dialled: bool) -> str:
    try:
        name = host if host.isascii() else host.encode("idna").decode("ascii")
    except UnicodeError:
        name = ""
    labels = name.removesuffix(".").split(".")
    # RFC 1123, 2.1, and underscores. No number alone: the C library takes it for an address, people for a port.
    good = (0 < len(label) < 64 and set(label) <= HOST_CHARACTERS and label[0] != "-" for label in labels)
    if len(name) > 253 or name.isdigit() or not all(good):
        raise _no_address(text, dialled)
    return name


HOST_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_")


def _parse_port(port: str, text: str, dialled: bool) -> int:
    if port.isascii() and port.isdigit():
        digits = port.lstrip("0")
        if len(digits) > 5 or int(port[-5:]) > 65535:
            raise ValueError(f"a port is at most 65535, found {text!r}")
        return int(port[-5:])
    # `null`, YAML's word for nothing, would be read as a service name.
    if not port or not set(port) <= HOST_CHARACTERS or text.lower() == "null":
        raise _no_address(text, dialled)
    try:
        return socket.getservbyname(port, "tcp")
    except OSError:
        # An address to dial needs a host: a word alone is not meant as a port.
        known = f" (services(5) has no {port!r})" if len(port) < 32 and (":" in text or not dialled) else ""
        raise _no_address(text, dialled, known) from None


def _is_ipv6(host: str) -> bool:
    # The codec for a str would let the digits of other scripts pass. The C library stops at a null byte.
    if not host.isascii() or not host.isprintable():
        return False
    try:
        socket.getaddrinfo(host, None, family=socket.AF_INET6, flags=socket.AI_NUMERICHOST)
    except (OSError, UnicodeError):
        return False
    return True
