"""The options that all commands have, and whom they ask: one socket, or those of all processes of a service."""

from __future__ import annotations

import argparse
import glob
import os
import re
import time
from collections.abc import Collection, Sequence
from typing import Any, NoReturn, TypeVar

from rspd.admin.client import PATIENCE, AnswerError, ask, sockets_of, strangers_of
from rspd.admin.merging import merge, merge_connections
from rspd.admin.query import Query
from rspd.admin.request import CONNECTIONS, CONTROL, STATUS
from rspd.commands.words import cut, safe
from rspd.errors import StartError
from rspd.parser import Parser
from rspd.snapshot import Connections, Process, Snapshot, read

T = TypeVar("T")

# Seconds. If one process of a service has answered, the others have so long, in a command and in each look of top.
GRACE, GRACE_OF_LOOKS = 2.0, 0.5

# Seconds after which a process is asked again that was too late.
AGAIN = 3.0

# Columns of what is shown of an answer that is none.
SAID_MAX = 300

# Why a socket is no longer that of a process.
NOBODY_THERE = (FileNotFoundError, ConnectionRefusedError)

# Where systemd makes the folders of services: RuntimeDirectory= of systemd.exec(5).
RUN = "/run"

SERVICE = "rspd"


def parser_of(command: str, description: str, epilog: str = "") -> Parser:
    """A parser of a command's options: those that all have, to which it adds its own."""
    parser = Parser(
        prog=f"rspd {command}",
        usage=f"rspd {command} [OPTION]...",
        add_help=False,
        description=description,
        epilog=epilog,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=80),
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--socket", metavar="PATH", help=f"the control socket, default {RUN}/{SERVICE}/{CONTROL}")
    parser.add_argument("--instance", metavar="NAME", help="ask the service rspd@NAME")
    parser.add_argument("-h", "--help", action="help", help="print this and exit")
    return parser


def socket_of(options: argparse.Namespace, run: str = RUN) -> str:
    """Which control socket the options name; without any, that of the service, or of the only instance.

    run: the folder of the services' folders. Raises StartError.
    """
    if options.socket and options.instance:
        raise StartError("expected either --socket PATH or --instance NAME, found both", os.EX_USAGE)
    if options.socket:
        return str(options.socket)
    found = instances(run)
    if options.instance:
        return _socket_of_instance(options.instance, found, run)
    path = os.path.join(run, SERVICE, CONTROL)
    if not found or os.path.exists(path):
        return path
    if len(found) == 1:
        return _path_of(found[0], run)
    names = "\n".join(f"  --instance {name}" for name in found)
    raise StartError(f"{path}: no such socket; several instances of rspd are running, name one:\n{names}", os.EX_USAGE)


def where(options: argparse.Namespace) -> str:
    """The options that name the service, to be repeated in advice; with a space before them, or empty."""
    for name, value in (("--socket", options.socket), ("--instance", options.instance)):
        if value:
            return f" {name} {quoted(value)}"
    return ""


def quoted(word: str) -> str:
    """A word for a shell."""
    import shlex  # for advice only

    return shlex.quote(word)


def instances(run: str = RUN) -> list[str]:
    """The names of the instances rspd@NAME that have a control socket."""
    paths = glob.glob(_path_of("*", glob.escape(run)))
    return sorted(os.path.basename(os.path.dirname(path)).removeprefix(f"{SERVICE}-") for path in paths)


def look(path: str, patience: float = PATIENCE) -> Snapshot:
    """What goes on in a service, all its processes taken together. Raises StartError.

    patience: seconds for each step of a request, here and in `look_at_each`.
    """
    return merged(path, *look_at_each(path, patience))


def look_at_each(path: str, patience: float = PATIENCE) -> tuple[list[Snapshot], list[str]]:
    """What goes on in each process of a service, and the sockets of those that do not say it. Raises StartError."""
    ((snapshots, unanswered),) = _ask_all(path, [(STATUS, Snapshot)], patience, GRACE)
    return snapshots, unanswered


def merged(path: str, snapshots: Sequence[Snapshot], unanswered: Sequence[str]) -> Snapshot:
    """The processes of a service taken together. unanswered: the sockets of those that do not answer."""
    whole = merge(snapshots)
    return whole._replace(process=_with_missing(whole.process, path, unanswered))


def look_at_connections(path: str, query: Query, late: Collection[str] = ()) -> Connections:
    """The open connections of a service that are asked for, all its processes taken together. Raises StartError.

    late: the sockets of processes that have just not answered, and are not asked again.
    """
    ((parts, unanswered),) = _ask_all(path, [(_target(query), Connections)], PATIENCE, GRACE, late)
    whole = merge_connections(parts, query)
    return whole._replace(process=_with_missing(whole.process, path, unanswered))


class Watch:
    """Looks at a service again and again. For a process that did not answer, no later look waits until it does."""

    def __init__(self, path: str, grace: float = GRACE) -> None:
        """path: the control socket. grace: as for `_ask_all`."""
        self.path, self._grace = path, grace
        self._late: dict[str, float] = {}  # by its socket: when to ask it again

    def look(self, query: Query) -> tuple[Snapshot, Connections]:
        """What goes on, and the open connections that are asked for. Raises StartError."""
        targets = [(STATUS, Snapshot), (_target(query), Connections)]
        (snapshots, missing), (parts, more) = _ask_all(self.path, targets, PATIENCE, self._grace, set(self._late))
        unanswered = list(dict.fromkeys([*missing, *more]))
        now = time.monotonic()
        for path in unanswered:
            if self._late.setdefault(path, now + AGAIN) <= now:
                from threading import Thread

                self._late[path] = now + AGAIN
                Thread(target=self._try, args=(path,), daemon=True).start()
        whole = merge_connections(parts, query)
        process = _with_missing(whole.process, self.path, unanswered)
        return merged(self.path, snapshots, unanswered), whole._replace(process=process)

    def _try(self, path: str) -> None:
        """Whether a process that was late answers now; or is gone."""
        try:
            ask(path, STATUS, PATIENCE)
        except (OSError, AnswerError) as error:
            if not isinstance(error, NOBODY_THERE):
                return
        self._late.pop(path, None)


def _target(query: Query) -> str:
    words = str(query)
    return f"{CONNECTIONS}?{words}" if words else CONNECTIONS


def _with_missing(process: Process, path: str, unanswered: Sequence[str]) -> Process:
    return process._replace(unanswered=(*process.unanswered, *unanswered), strangers=tuple(strangers_of(path)))


def _path_of(instance: str, run: str) -> str:
    return os.path.join(run, f"{SERVICE}-{instance}", CONTROL)


def _socket_of_instance(said: str, found: Sequence[str], run: str) -> str:
    # The name of its unit is as clear.
    name = re.sub(r"\.service$", "", said).removeprefix(f"{SERVICE}@")
    if not re.fullmatch(r"[A-Za-z0-9:_.\\-]{1,200}", name):
        raise StartError(f"--instance: expected the NAME of a service rspd@NAME, found {said!r}", os.EX_USAGE)
    path = _path_of(name, run)
    if found and name not in found and not os.path.exists(path):
        others = ", ".join(found)
        raise StartError(f"{path}: no such socket; instances with one are: {others}", os.EX_UNAVAILABLE)
    return path


def _ask_all(
    path: str, targets: Sequence[tuple[str, type]], patience: float, grace: float, late: Collection[str] = ()
) -> list[tuple[list[Any], list[str]]]:
    """Ask all processes of a service for all targets, each with the kind of its answer, at the same moment.

    grace: so long the others are waited for once each target has an answer. late: sockets that are not asked.
    Of each target: the answers, and the sockets of the processes without one. A socket at which nobody listens has been
    left by a process that is gone. Raises StartError if no process answers.
    """
    paths = sockets_of(path)
    jobs = [(path, target, kind) for path in paths if path not in late for target, kind in targets]
    jobs = jobs or [(path, target, kind) for path in paths for target, kind in targets]
    outcomes: dict[tuple[str, str], Any] = {}
    if len(jobs) == 1:
        outcomes[jobs[0][:2]] = _ask_one(*jobs[0], patience)
    else:
        _ask_at_once(jobs, patience, grace, outcomes)
    found = []
    for target, _ in targets:
        each = {path: outcomes.get((path, target), TimeoutError()) for path in paths}
        answers = [one for one in each.values() if not isinstance(one, Exception)]
        failed = {path: one for path, one in each.items() if isinstance(one, Exception)}
        unanswered = [path for path, error in failed.items() if not isinstance(error, NOBODY_THERE)]
        if not answers:
            first = path if path in unanswered or not unanswered else unanswered[0]
            _give_up(first, failed[first], patience)
        found.append((answers, unanswered))
    return found


def _ask_at_once(
    jobs: Sequence[tuple[str, str, type]], patience: float, grace: float, outcomes: dict[tuple[str, str], Any]
) -> None:
    """Collect the outcomes of all; of those that come too late, none."""
    from queue import Empty, SimpleQueue  # most services are one process
    from threading import Thread

    done: SimpleQueue[tuple[tuple[str, str], Any]] = SimpleQueue()

    def run(path: str, target: str, kind: type) -> None:
        outcome: Any
        try:
            outcome = _ask_one(path, target, kind, patience)
        except Exception as bug:  # else it would be waited for without end
            outcome = bug
        done.put(((path, target), outcome))

    for job in jobs:
        Thread(target=run, args=job, daemon=True).start()
    missing = {target for _, target, _ in jobs}
    end: float | None = None
    while len(outcomes) < len(jobs):
        if not missing and end is None:
            end = time.monotonic() + grace
        try:
            key, outcome = done.get(timeout=None if end is None else max(0.0, end - time.monotonic()))
        except Empty:
            return
        outcomes[key] = outcome
        if isinstance(outcome, Exception) and not isinstance(outcome, (OSError, AnswerError)):
            raise outcome
        if not isinstance(outcome, Exception):
            missing.discard(key[1])


def _ask_one(path: str, target: str, kind: type[T], patience: float) -> T | Exception:
    try:
        return read(kind, ask(path, target, patience))
    except (OSError, AnswerError) as error:
        return error
    except ValueError as error:
        return AnswerError(str(error))


def _give_up(path: str, error: Exception, patience: float) -> NoReturn:
    """Say why nobody could be asked, and what to do."""
    if isinstance(error, AnswerError):
        advice = "is it the control socket of rspd? Another one is named with --instance NAME or --socket PATH"
        if error.status == 500:  # it is
            advice = f"please report what the log says: journalctl -u {unit_of(path)}"
        raise StartError(f"{path}: {cut(safe(str(error)), SAID_MAX)}\n{advice}", os.EX_PROTOCOL)
    if isinstance(error, PermissionError):
        raise StartError(f"{path}: permission denied\n{_who_may(path)}", os.EX_NOPERM)
    if isinstance(error, (TimeoutError, BlockingIOError, ConnectionResetError, BrokenPipeError)):
        broken = isinstance(error, (ConnectionResetError, BrokenPipeError))
        what = "the answer broke off" if broken else f"no answer within {patience:g} s"
        advice = f"it may be very busy, or stopped; try again, or see systemctl status {unit_of(path)}"
        raise StartError(f"{path}: {what}\n{advice}", os.EX_TEMPFAIL)
    what = str(getattr(error, "strerror", "") or error)
    if isinstance(error, FileNotFoundError):
        what = "no such socket"
    elif isinstance(error, ConnectionRefusedError):
        what = "nobody listens there"
    lines = [
        f"{path}: {what}: no rspd can be asked there",
        f"does it run? See systemctl status {unit_of(path)}; name another one with --instance NAME or --socket PATH",
        "an rspd that was started in a shell has a control socket only if its file has the key control",
    ]
    raise StartError("\n".join(lines), os.EX_UNAVAILABLE)


def unit_of(path: str) -> str:
    """The unit of the process that has a control socket."""
    if worker := re.fullmatch(r"(?:.*-)?worker-(.+)\.sock", os.path.basename(path)):
        return f"{SERVICE}-worker@{worker[1]}"
    folder = os.path.basename(os.path.dirname(path))
    instance = folder.removeprefix(f"{SERVICE}-")
    return f"{SERVICE}@{instance}" if instance != folder else SERVICE


def _who_may(path: str) -> str:
    import grp  # for this message only
    import pwd

    try:
        group = grp.getgrgid(os.stat(path).st_gid).gr_name
    except (OSError, KeyError):
        group = SERVICE  # the socket's folder is closed too, or the group has no name
    try:
        user = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        user = "USER"
    members = f"the group {group}" if group != "root" else f"the user {SERVICE}"
    joins = f"; to join: sudo usermod -aG {group} {user}, and log in again" if group != "root" else ""
    return f'root and {members} may look: use sudo{joins}\ncontrol_mode: "0666" in the file of rspd lets everybody look'
