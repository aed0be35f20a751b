"""The command line: options over the configuration file, --check, exit codes."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from rspd import __version__, log
from rspd.address import parse_address
from rspd.config import DEFAULT_FILE, PARSERS, Config, load_config, parse_backend
from rspd.service import EX_CONFIG, EX_NOPERM, EX_USAGE, StartError, run
from rspd.yamlfile import ConfigError

T = TypeVar("T")

DESCRIPTION = "Accepts TCP connections and relays each to a backend, one at a time by default."

EPILOG = f"""\
An ADDRESS is PORT (every local address, to listen), HOST:PORT, [IPV6]:PORT,
/PATH (a unix socket) or @NAME (one in the abstract namespace). Options win over
the file. Without -c, and without an address, {DEFAULT_FILE} is read.
SIGTERM and SIGINT end rspd once the open connections have ended, a second one
at once; SIGHUP reads the file again. Exit codes: 0; 64 usage, 69 cannot listen,
71 too few descriptors, 77 no permission, 78 configuration.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rspd with these arguments, by default the process's, and return its exit code (sysexits(3))."""
    _open_standard_descriptors()
    parser = _parser()
    options = parser.parse_args(arguments)
    overrides = _overrides(parser, options)
    path = options.config
    if path is None and not {"listen", "backends"} & overrides.keys():
        path = DEFAULT_FILE

    def load() -> Config:
        return load_config(path, overrides)

    try:
        config = load()
    except ConfigError as error:
        return _fail(EX_CONFIG if path else EX_USAGE, *error.errors)
    except OSError as error:
        code = EX_NOPERM if isinstance(error, PermissionError) else EX_CONFIG
        advice = "" if options.config else "; name another with -c, or see rspd --help"
        return _fail(code, f"{path}: cannot be read: {error.strerror}{advice}")
    if options.check:
        print(f"{path or 'command line'}: valid; {describe(config)}")
        return 0
    log.set_up(config.log_level)
    try:
        run(config, load if path else None)
    except StartError as error:
        return _fail(error.exit_code, str(error))
    return 0


def describe(config: Config) -> str:
    """What a configuration makes rspd do, in words."""
    proxy = config.proxy
    count = "one connection" if proxy.max_connections == 1 else f"{proxy.max_connections} connections"
    listen = ", ".join(map(str, proxy.listen))
    return f"listening on {listen}, relaying to {', '.join(map(str, proxy.backends))}, {count} at a time"


class Parser(argparse.ArgumentParser):
    """argparse with the exit code of sysexits(3)."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the arguments, and exit."""
        self.print_usage(sys.stderr)
        sys.exit(_fail(EX_USAGE, f"{message}; see rspd --help"))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="rspd",
        add_help=False,
        usage="rspd [-c FILE] [-l ADDRESS]... [-b ADDRESS]... [OPTION]...\n       rspd PORT BACKEND_HOST BACKEND_PORT",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=80),
        allow_abbrev=False,
    )
    parser.add_argument("original", nargs="*", help=argparse.SUPPRESS)
    add = parser.add_argument
    add("-c", "--config", metavar="FILE", help="the configuration file")
    add("-l", "--listen", metavar="ADDRESS", action="append", type=_checked(parse_address), help="listen there")
    add("-b", "--backend", metavar="ADDRESS", action="append", type=_checked(parse_backend), help="relay to there")
    add("--max-connections", metavar="N", type=_checked(PARSERS["max_connections"]), help="serve N clients at once")
    add("--log-level", metavar="LEVEL", type=_checked(PARSERS["log_level"]), help="debug, info, warning or error")
    add("--foreground", action="store_true", help="stay in the foreground")
    add("--check", action="store_true", help="check the configuration and exit")
    add("-h", "--help", action="help", help="print this and exit")
    add("--version", action="version", version=f"rspd {__version__}", help="print the version and exit")
    return parser


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
        "backends": tuple(dict.fromkeys(backends)) if backends else None,
        "max_connections": options.max_connections,
        "log_level": options.log_level,
    }
    return {name: value for name, value in values.items() if value is not None}


def _fail(code: int, *messages: str) -> int:
    for message in messages:
        print(f"rspd: {message}", file=sys.stderr)
    return code


def _open_standard_descriptors() -> None:
    """Put /dev/null where stdin, stdout or stderr is closed, lest a client's socket gets the log's number."""
    while True:
        fd = os.open(os.devnull, os.O_RDWR)
        if fd > 2:
            os.close(fd)
            break
    # Python has None in place of what was closed; argparse and print want a file.
    sys.stdout = sys.stdout or open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = sys.stderr or open(2, "w", closefd=False)  # noqa: SIM115
    # A file's name need not be UTF-8.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
