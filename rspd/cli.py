"""The command line: options over the configuration file, --check, exit codes."""

from __future__ import annotations

import argparse
import io
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NoReturn, TypeVar

from rspd import __version__
from rspd.address import parse_address, parse_backend
from rspd.config import DEFAULT_FILE, GENERAL_KEYS, PROXY_KEYS, BackendConfig, Config, load_config
from rspd.errors import StartError
from rspd.log import complain, set_up
from rspd.pidfile import PidFile
from rspd.process import Starter, detach, started_by_systemd
from rspd.service import run
from rspd.systemd import Notifier, take_sockets
from rspd.yamlfile import ConfigError

log = logging.getLogger(__name__)

T = TypeVar("T")

DESCRIPTION = "Accepts TCP connections and relays each to a backend, one at a time by default."

EPILOG = f"""\
An ADDRESS is PORT (everywhere, to listen), HOST:PORT, [IPV6]:PORT, /PATH (unix
socket), @NAME (abstract one) or fd://NAME (from systemd, to listen). Options
win over FILE; without it and an address, {DEFAULT_FILE} is read. SIGTERM or
SIGINT ends rspd once its connections have ended, a second one at once; SIGHUP
reads FILE again. Exit codes: 0; 64 usage, 69 cannot listen, 70 a bug, 71 too
few descriptors, 73 pid file, 77 no permission, 78 configuration.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rspd with these arguments, by default the process's, and return its exit code (sysexits(3))."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop has it: end without a traceback
    _open_standard_descriptors()
    notifier = Notifier()
    starter: Starter | None = None
    try:
        parser = _parser()
        options = parser.parse_args(arguments)
        overrides = _overrides(parser, options)
        path = options.config
        if path is None and not {"listen", "backends"} & overrides.keys():
            path = DEFAULT_FILE
        if options.check:
            from rspd.description import describe  # for this only

            config = _load_first(path, overrides, sockets=True)
            print(f"{path or 'command line'}: valid", *describe(config), sep="\n")
            return 0
        sockets = take_sockets()
        config = _load_first(path, overrides, sockets=bool(sockets))
        full_path = path and os.path.abspath(path)  # a daemon works in another folder

        def load() -> Config:
            return load_config(full_path, overrides, sockets=bool(sockets))

        def on_ready() -> None:
            if starter:
                starter.release(0)

        if not options.foreground and not started_by_systemd():
            connections = sum(proxy.max_connections for proxy in config.proxies)
            starter = detach([sock.fileno() for _, sock in sockets], 2 * connections)
        set_up(config.log_level)
        with PidFile(options.pid_file) if options.pid_file else nullcontext():
            run(config, load if path else None, sockets, notifier, on_ready)
        return 0
    except StartError as error:
        notifier.failed(str(error), error.errno)
        if not (starter and starter.release(error.exit_code, str(error))):
            complain(str(error))
        return error.exit_code
    except Exception:
        set_up(Config._field_defaults["log_level"])
        log.exception("unexpected error, rspd ends; please report it")
        return os.EX_SOFTWARE


def _load_first(path: str | None, overrides: dict[str, Any], sockets: bool) -> Config:
    try:
        return load_config(path, overrides, sockets=sockets)
    except ConfigError as error:
        raise StartError("\n".join(error.errors), os.EX_CONFIG if path else os.EX_USAGE) from None
    except OSError as error:
        code, advice = os.EX_CONFIG, "name another with -c, or see rspd --help"
        if isinstance(error, PermissionError):
            code, advice = os.EX_NOPERM, "let the user that rspd runs as read it"
        elif isinstance(error, FileNotFoundError):
            advice = "make it, or name another with -c"
        raise StartError(f"{path}: cannot be read: {error.strerror}; {advice}", code, error.errno or 0) from None


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of sysexits(3)."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments. Raises StartError."""
        self.print_usage(sys.stderr)
        raise StartError(f"{message}; see rspd --help", os.EX_USAGE)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="rspd",
        add_help=False,
        usage="rspd [-c FILE] [-l ADDRESS]... [-b ADDRESS]... [OPTION]...\n       rspd PORT BACKEND_HOST BACKEND_PORT",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=33, width=80),
        allow_abbrev=False,
    )
    parser.add_argument("original", nargs="*", help=argparse.SUPPRESS)
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help="the configuration file")
    add("-l", "--listen", metavar="ADDRESS", action="append", type=_checked(parse_address), help="listen there")
    add("-b", "--backend", metavar="ADDRESS", action="append", type=_checked(parse_backend), help="relay to there")
    add(
        "--max-connections",
        metavar="N",
        type=_checked(PROXY_KEYS["max_connections"].parse),
        help="serve N clients at once",
    )
    add(
        "--log-level",
        metavar="LEVEL",
        type=_checked(GENERAL_KEYS["log_level"].parse),
        help="debug, info, warning or error",
    )
    add(
        "--exit-idle-time",
        metavar="DURATION",
        type=_checked(GENERAL_KEYS["exit_idle_time"].parse),
        help="end when idle for so long",
    )
    add("--foreground", action="store_true", help="stay in the foreground")
    add("--pid-file", metavar="FILE", type=_checked(_parse_path), help="write the process's number there")
    add("--check", action="store_true", help="check the configuration and exit")
    add("-h", "--help", action="help", help="print this and exit")
    add("--version", action="version", version=f"rspd {__version__}", help="print the version and exit")
    return parser


def _parse_path(text: str) -> str:
    if not text:
        raise ValueError("expected a file, found ''")
    return os.path.abspath(text)


def _checked(parse: Callable[[str], T]) -> Callable[[str], T]:
    """A parser whose ValueError argparse repeats to the user."""

    def check(text: str) -> T:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return check


def _overrides(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says in place of the configuration file."""
    listen, backends = options.listen, options.backend
    if options.original:
        if len(options.original) != 3:
            parser.error(f"expected PORT BACKEND_HOST BACKEND_PORT, found {' '.join(options.original)!r}")
        if listen or backends:
            parser.error("expected either PORT BACKEND_HOST BACKEND_PORT or -l and -b, found both")
        port, host, backend_port = options.original
        if host.startswith(("/", "@")):
            parser.error(f"expected a host, found {host!r}; -l and -b take unix sockets")
        host = f"[{host}]" if ":" in host and not host.startswith("[") else host
        try:
            listen, backends = [parse_address(port)], [parse_backend(f"{host}:{backend_port}")]
        except ValueError as error:
            parser.error(str(error))
    values = {
        "listen": tuple(dict.fromkeys(listen)) if listen else None,
        "backends": tuple(BackendConfig(address) for address in dict.fromkeys(backends)) if backends else None,
        "max_connections": options.max_connections,
        "log_level": options.log_level,
        "exit_idle_time": options.exit_idle_time,
    }
    return {name: value for name, value in values.items() if value is not None}


def _open_standard_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed, lest a client's socket gets the log's number."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            break
    # Python has None in place of what was closed; argparse, print and python-daemon want a file.
    sys.stdin = sys.stdin or open(0, closefd=False)  # noqa: SIM115
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    # A file's name need not be UTF-8.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
