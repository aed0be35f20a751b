"""The command line: options over the configuration file, --check, exit codes."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn

from rspd import __version__
from rspd.config.addresses import parse_address, parse_backend, parse_pair
from rspd.config.keys import GENERAL_KEYS, PROXY_KEYS, load_config
from rspd.config.values import closest, listed, matching
from rspd.errors import ConfigError, StartError
from rspd.host.detach import Starter, detach, open_standard_descriptors, started_by_systemd
from rspd.host.pidfile import PidFile, process_in
from rspd.host.systemd import Notifier, take_descriptors
from rspd.host.upgrade import CAN_TAKE_OVER, COMMAND, PID_FILE, Program, Successor, ask
from rspd.log import complain, set_up
from rspd.parser import COMMANDS, Parser, checked, show
from rspd.running.service import run
from rspd.settings import DEFAULT_FILE, BackendConfig, Config

if TYPE_CHECKING:
    from rspd.host.systemd import StoredDescriptor
    from rspd.running.legacy import Legacy

log = logging.getLogger(__name__)

DESCRIPTION = "Accepts TCP connections and relays each to a backend, one at a time by default."

EPILOG = """\
An ADDRESS is PORT (everywhere, to listen), HOST:PORT, [IPV6]:PORT, /PATH (unix
socket), @NAME (abstract one) or fd://NAME (from systemd). SIGTERM or SIGINT
ends rspd after its connections, a second one at once. SIGHUP reads FILE again.
Exit codes: 64 usage, 69 address, 70 bug, 71 limits, 73 file, 77 user, 78 FILE.
"""

SHORT = "PORT BACKEND_HOST:BACKEND_PORT"

USAGE = """\
rspd [-c FILE] [-l ADDRESS]... [-b ADDRESS]... [OPTION]...
       rspd PORT BACKEND_HOST:BACKEND_PORT, or PORT BACKEND_HOST BACKEND_PORT
       rspd status|connections|top, to look at one that runs, or upgrade PID"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run rspd with these arguments, by default the process's, and return its exit code (sysexits(3))."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until the loop handles SIGINT: end without a traceback
    open_standard_descriptors()
    program = Program.of_this_process()
    notifier = Notifier()
    starter = Starter(-1)  # nobody waits
    try:
        words = list(sys.argv[1:] if arguments is None else arguments)
        if words[:1] == ["upgrade"]:
            ask(_process(words[1:]))
        parser = _parser()
        options = parser.parse_args(arguments)
        overrides = _overrides(parser, options)
        path = options.config
        if path is None and not {"listen", "backends"} & overrides.keys():
            path = DEFAULT_FILE
        if options.check:
            _check(path, overrides, every_value=options.all)
            return 0
        _start(options, path, overrides, program, notifier, starter)
        return 0
    except StartError as error:
        notifier.failed(str(error), error.errno)
        if not starter.release(error.exit_code, str(error)):
            complain(str(error))
        return error.exit_code
    except Exception:
        set_up(Config._field_defaults["log_level"])
        log.exception("unexpected error, rspd ends; please report it")
        return os.EX_SOFTWARE


def _start(
    options: argparse.Namespace,
    path: str | None,
    overrides: dict[str, Any],
    program: Program,
    notifier: Notifier,
    starter: Starter,
) -> None:
    """Serve to the end; do not return after a handover. Raises StartError.

    starter: becomes the one that waits, if one does.
    """
    sockets, found = take_descriptors()
    # Of these two, there is one each if this process has executed the program anew.
    kept = {name: fd for name, fd in found if name in (COMMAND, PID_FILE)}
    starter.fd = kept.get(COMMAND, -1)
    stored = [one for one in found if one.name not in kept]
    legacy = _legacy(stored) if stored else None
    config, fault = _load_or_go_on(path, overrides, bool(sockets), legacy)
    # A daemon works in another folder.
    full_path = path and os.path.abspath(path)
    pid_file = options.pid_file and os.path.abspath(options.pid_file)
    load = partial(load_config, full_path, overrides, sockets=bool(sockets)) if path else None
    by_systemd = started_by_systemd()
    if COMMAND in kept:
        if not options.foreground:
            os.chdir("/")  # it is a daemon already
    elif not options.foreground and not by_systemd:
        connections = sum(proxy.max_connections for proxy in config.proxies)
        starter.fd = detach([sock.fileno() for _, sock in sockets], 2 * connections).fd
    set_up(config.log_level)
    # A container's manager may want to be notified, but keeps nothing.
    successor = None if by_systemd and "container" not in os.environ else Successor(program, sockets)
    with PidFile(pid_file, kept.get(PID_FILE, -1)) if pid_file else nullcontext() as file:
        if successor and file:
            successor.pid_file = file.fd
        on_ready = partial(starter.release, 0)
        handed_over = run(config, load, sockets, notifier, on_ready, legacy, fault, successor, __version__)
        if handed_over and successor:
            _execute(successor)
    if handed_over:
        # The next process has the connections, and waits: to free what stood for them here takes Python a while.
        os._exit(0)


def _load_or_go_on(
    path: str | None, overrides: dict[str, Any], sockets: bool, legacy: Legacy | None
) -> tuple[Config, str]:
    """The configuration, or that of the process before and what is wrong with the file. Raises StartError."""
    try:
        return _load_first(path, overrides, sockets=sockets), ""
    except StartError as error:
        if not legacy or not (before := legacy.config()):
            raise
        return before, str(error)


def _execute(successor: Successor) -> NoReturn:
    try:
        successor.execute()
    except OSError as error:
        log.error("the program cannot be executed, all connections end: %s", error)
        os._exit(os.EX_OSERR)


def _process(words: Sequence[str]) -> int:
    """The process that `rspd upgrade` names. Raises StartError."""
    parser = Parser(prog="rspd upgrade", usage="rspd upgrade PID|--pid-file FILE", allow_abbrev=False)
    parser.add_argument("pid", nargs="?", type=checked(matching(r"[1-9]\d{0,8}", "a process's number")))
    parser.add_argument("--pid-file", metavar="FILE")
    options = parser.parse_args(words)
    if bool(options.pid) == bool(options.pid_file):
        parser.error("expected the number of a process, or --pid-file FILE")
    return int(options.pid) if options.pid else process_in(options.pid_file)


def _legacy(stored: Sequence[StoredDescriptor]) -> Legacy:
    """What the process before has left in systemd's store."""
    from rspd.running.legacy import Legacy  # only for a service that was restarted

    set_up(Config._field_defaults["log_level"])
    return Legacy(stored)


def _check(path: str | None, overrides: dict[str, Any], every_value: bool) -> None:
    """Say on stdout what the configuration means, or all values in force. Warn of what may be right elsewhere."""
    config = _load_first(path, overrides, sockets=None)
    source = path or "command line"
    # A check that systemd starts, as before a reload, does not warn: a socket unit may bring the address.
    for proxy in config.proxies if not started_by_systemd() else ():
        if not proxy.listen:
            key = f"proxies.{proxy.name}.listen" if proxy.name else "listen"
            complain(f"warning: {source}: {key}: missing, rspd can start only where systemd passes a socket")
    # Each module is for this only.
    if config.control_group:
        import grp

        try:
            grp.getgrnam(config.control_group)
        except KeyError:
            what = f"control_group: expected a group of this host, found {config.control_group!r}"
            complain(f"warning: {source}: {what}; rspd starts without it")
    if every_value:
        from rspd.explaining.dump import dump

        show(dump(config).removesuffix("\n"))
    else:
        from rspd.explaining.summary import describe

        show("\n".join([f"{source}: valid", *describe(config)]))


def _load_first(path: str | None, overrides: dict[str, Any], sockets: bool | None) -> Config:
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


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="rspd",
        add_help=False,
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=33, width=80),
        allow_abbrev=False,
    )
    parser.keys = PROXY_KEYS
    add = parser.add_argument

    def add_value(names: str, value: str, parse: Callable[[str], object], text: str, action: str = "store") -> None:
        add(*names.split(), metavar=value, type=checked(parse), help=text, action=action)

    add("addresses", nargs="*", help=argparse.SUPPRESS)
    add_value("-c --config", "FILE", str, f"configuration, else {DEFAULT_FILE}; options win")
    add_value("-l --listen", "ADDRESS", listed(parse_address, "an address", "-l"), "listen there", action="append")
    add_value("-b --backend", "ADDRESS", listed(parse_backend, "an address", "-b"), "relay to there", action="append")
    add_value("--max-connections", "N", PROXY_KEYS["max_connections"].parse, "serve N clients at once")
    add_value("--log-level", "LEVEL", GENERAL_KEYS["log_level"].parse, "debug, info, warning or error")
    add_value("--exit-idle-time", "DURATION", GENERAL_KEYS["exit_idle_time"].parse, "end when idle for so long")
    add("--foreground", action="store_true", help="stay in the foreground")
    add_value("--pid-file", "FILE", matching("(?s).+", "a file"), "write the process's number there")
    add("--check", action="store_true", help="check the configuration and exit")
    add("--all", action="store_true", help="with --check: print each value in force")
    add(CAN_TAKE_OVER, action="store_true", help=argparse.SUPPRESS)
    add("-h", "--help", action="help", help="print this and exit")
    add("-V", "--version", action="version", version=f"rspd {__version__}", help="print the version and exit")
    return parser


def _overrides(parser: argparse.ArgumentParser, options: argparse.Namespace) -> dict[str, Any]:
    """What the command line says in place of the configuration file."""
    listen, backends = options.listen, options.backend
    if options.addresses:
        if listen or backends:
            parser.error(f"expected either {SHORT} or -l and -b, found both")
        if len(options.addresses) not in (2, 3):
            parser.error(f"expected {SHORT}, found {' '.join(options.addresses)!r}{_advise(options.addresses[0])}")
        try:
            listen, backends = ([address] for address in parse_pair(options.addresses))
        except ValueError as error:
            parser.error(str(error))
    if options.all and not options.check:
        parser.error("--all goes with --check")
    values = {name: getattr(options, name) for name in ("max_connections", "log_level", "exit_idle_time")}
    values["listen"] = tuple(dict.fromkeys(listen)) if listen else None
    values["backends"] = tuple(map(BackendConfig, dict.fromkeys(backends))) if backends else None
    return {name: value for name, value in values.items() if value is not None}


def _advise(word: str) -> str:
    """What was probably meant by arguments that begin with a word that is no port; empty where that is not known."""
    if os.path.isfile(word):
        return f"; a configuration file needs -c: rspd -c {word}"
    if word in COMMANDS:
        return f"; the command comes first: rspd {word}"
    actions = ("start", "stop", "restart", "reload")
    meant = closest(word, (*COMMANDS, *actions))
    if meant in actions:
        return f"; the service is for systemctl: systemctl {meant} rspd"
    return f"; did you mean rspd {meant}?" if meant in COMMANDS else ""
