"""The counters in Prometheus' formats: the text that its server asks for.

Only here is prometheus_client used. It is imported when an `Exposition` is made: not by who has no metrics.
"""

import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import accumulate
from typing import TYPE_CHECKING, Any, NamedTuple

from rspd.admin.client import UNANSWERED, Question
from rspd.admin.history import History, Values, note
from rspd.admin.merging import merge
from rspd.admin.request import STATUS
from rspd.snapshot import CONNECT_BOUNDS, CONNECTION_BOUNDS, QUEUE_BOUNDS, TURN_BOUNDS, Snapshot, read

if TYPE_CHECKING:
    from prometheus_client.core import Metric

# Seconds: for connecting to all workers, until their answers begin, and for each step of one; and for all of it.
# Prometheus waits for 10 s if it is not told otherwise. It may wait for the text before its own, too.
PATIENCE, PATIENCE_FOR_ALL = 1.0, 3.0

OPENMETRICS = "application/openmetrics-text"

# Seconds. A thread at work keeps the loop's thread waiting for so long; it would be 5 ms (sys.setswitchinterval).
SWITCH_INTERVAL = 0.0001


class Family(NamedTuple):
    """A metric. labels: their names. words: what it is. bounds: of a histogram's buckets."""

    kind: str
    name: str
    labels: tuple[str, ...]
    words: str
    bounds: tuple[float, ...] = ()


PROXY, BACKEND = ("proxy",), ("proxy", "pool", "backend")

FAMILIES = (
    Family("gauge", "rspd_open_connections", PROXY, "Connections that are open now."),
    Family("gauge", "rspd_max_connections", PROXY, "How many connections may be open at once."),
    Family("gauge", "rspd_backlog", PROXY, "Clients that wait in the kernel's queue, not yet accepted."),
    Family("counter", "rspd_accepted_total", PROXY, "Clients accepted, refused ones too."),
    Family(
        "counter",
        "rspd_connections_total",
        ("proxy", "backend", "cause"),
        "Connections that have ended, by the cause that the log shows. Backend -: they had none.",
    ),
    Family(
        "counter",
        "rspd_bytes_total",
        ("proxy", "backend", "direction"),
        "Bytes relayed, those of open connections too. upload: from clients, download: from backends.",
    ),
    Family("counter", "rspd_refused_total", ("proxy", "reason"), "Clients refused, by the key that refused them."),
    Family("counter", "rspd_routed_total", ("proxy", "route"), "Clients that took a route."),
    Family(
        "histogram", "rspd_connection_seconds", PROXY, "How long connections lasted that have ended.", CONNECTION_BOUNDS
    ),
    Family("gauge", "rspd_queue_length", ("proxy", "pool"), "Clients that are accepted and wait for a backend."),
    Family("histogram", "rspd_queue_seconds", PROXY, "How long clients waited for a backend.", QUEUE_BOUNDS),
    Family(
        "gauge",
        "rspd_backend_up",
        BACKEND,
        "Whether a backend may get connections: 1 if it may in at least one process, 0 if it may in none.",
    ),
    Family("gauge", "rspd_backend_up_processes", BACKEND, "In how many processes a backend may get connections."),
    Family("gauge", "rspd_backend_connections", BACKEND, "Connections of a backend, those being opened too."),
    Family(
        "counter", "rspd_backend_checks_total", (*BACKEND, "result"), "Checks of a backend, good ones and bad ones."
    ),
    Family("counter", "rspd_connect_failures_total", BACKEND, "Attempts to connect to a backend that failed."),
    Family(
        "histogram", "rspd_connect_seconds", BACKEND, "How long connecting took, where it succeeded.", CONNECT_BOUNDS
    ),
    Family(
        "counter",
        "rspd_reloads_total",
        ("result",),
        "Reloads of the configuration, by result: ok or failed. With workers: of the process that has most.",
    ),
    Family(
        "gauge",
        "rspd_config_last_reload_successful",
        (),
        "Whether the last reload, or start, went by the file as it is: 1 if so, 0 if older settings are in force.",
    ),
    Family("counter", "rspd_handovers_total", (), "Restarts in which the connections went on."),
    Family("gauge", "rspd_descriptors", (), "Open file descriptors, of the process that is nearest to its limit."),
    Family("gauge", "rspd_descriptors_max", (), "The limit of that process."),
    Family("histogram", "rspd_loop_turn_seconds", (), "How long the turns of the event loop took.", TURN_BOUNDS),
    Family(
        "gauge",
        "rspd_processes",
        ("state",),
        "Processes of the service: those that answer, and silent workers.",
    ),
    Family("gauge", "rspd_start_time_seconds", (), "When the service started, as Unix time. A restart keeps it."),
    Family("info", "rspd_build_info", ("version",), "The version of rspd."),
)


class Exposition:
    """The text of all metrics.

    workers: says where the control sockets of the other processes are that are summed up with this one.
    Raises ImportError if prometheus_client is missing.
    """

    def __init__(self, workers: Callable[[], Sequence[str]] = tuple) -> None:
        import prometheus_client.core
        import prometheus_client.exposition

        self._core = prometheus_client.core
        self._choose_encoder = prometheus_client.exposition.choose_encoder
        self._workers = workers
        self._silent: set[str] = set()  # the paths of those that did not answer when asked last
        self._history = History()

    def texts(self, own: Snapshot, accepts: Iterable[str]) -> dict[str, tuple[str, bytes]]:
        """For each header Accept, the type of the content and the content: OpenMetrics if it names that, else text.

        own: what this process says. To be called in one thread at a time, beside that of the loop: asking the workers
        takes up to PATIENCE_FOR_ALL seconds, and one step more.
        """
        interval = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            values = self._values(own)
            # Not the header itself: what its parameters do differs between the versions of prometheus_client.
            wanted = {accept: OPENMETRICS if OPENMETRICS in accept.lower() else "" for accept in accepts}
            made = {kind: self._encode(values, kind) for kind in set(wanted.values())}
            return {accept: made[kind] for accept, kind in wanted.items()}
        finally:
            sys.setswitchinterval(interval)

    def text(self, own: Snapshot, accept: str) -> tuple[str, bytes]:
        """`texts` for one."""
        return self.texts(own, [accept])[accept]

    def hand_over(self) -> Any:
        """What `resume` takes in the next process, as a value for JSON; at any time, in any thread.

        Empty if there is nothing to go on from.
        """
        return self._history.hand_over()

    def resume(self, value: Any) -> None:
        """Go on from what the process before has handed over. Raises ValueError if it does not fit."""
        self._history.resume(value)

    def _values(self, own: Snapshot) -> Values:
        paths = self._workers()
        answers = self._ask(paths)
        self._history.take(own, answers)
        present = _present(own, merge([own, *answers.values()]), silent=len(paths) - len(answers))
        return {**self._history.sums(), **present}

    def _ask(self, paths: Sequence[str]) -> dict[str, Snapshot]:
        """What the workers say, by the paths of their sockets. They run as this user; nobody else is believed.

        First all are asked, so that those that are frozen use up the same time. Then one answer is read after another,
        as they come: threads would take the interpreter from the loop by turns. Where nobody accepts, connecting may
        take a while, and so may an answer that comes in drops. So those that did not answer last time come last.
        """
        began = time.monotonic()
        end = began + PATIENCE_FOR_ALL
        asked, answers, unread = list[tuple[str, Question]](), dict[str, Snapshot](), set[str]()
        with ExitStack() as stack:
            for path in sorted(paths, key=self._silent.__contains__):
                left = max(began + PATIENCE - time.monotonic(), 0.001)
                with suppress(*UNANSWERED):
                    question = stack.enter_context(closing(Question(path, left, end, ours=True)))
                    question.put(STATUS)
                    asked.append((path, question))
            begin_until = time.monotonic() + PATIENCE
            for silent in (False, True):
                some = {
                    question.fileno(): (path, question) for path, question in asked if (path in self._silent) is silent
                }
                unread |= _read_all(some, begin_until, end, answers)
        self._silent = set(paths) - answers.keys() - unread
        return {path: answers[path] for path in paths if path in answers}

    def _encode(self, values: Values, kind: str) -> tuple[str, bytes]:
        encoder, content_type = self._choose_encoder(kind)
        registry = self._core.CollectorRegistry()
        registry.register(_Collector(self._family, values))
        return content_type, encoder(registry)

    def _family(self, family: Family, values: Values) -> "Metric":
        """A metric as prometheus_client has it; without samples if there are no values that fit."""
        width = len(family.bounds) + 2 if family.bounds else 1
        series = [
            (labels, each)
            for labels, each in values.get(family.name, {}).items()
            if len(labels) == len(family.labels) and len(each) == width
        ]
        if family.kind == "histogram":
            histogram = self._core.HistogramMetricFamily(family.name, family.words, labels=family.labels)
            names = (*map(str, family.bounds), "+Inf")
            for labels, (*counts, total) in series:
                # As Prometheus counts: a bucket holds what the buckets below it hold, too.
                histogram.add_metric(labels, list(zip(names, accumulate(counts), strict=True)), total)
            return histogram
        if family.kind == "info":
            info = self._core.InfoMetricFamily(family.name.removesuffix("_info"), family.words)
            for labels, _ in series:
                info.add_metric((), dict(zip(family.labels, labels, strict=True)))
            return info
        kind = self._core.CounterMetricFamily if family.kind == "counter" else self._core.GaugeMetricFamily
        plain = kind(family.name, family.words, labels=family.labels)
        for labels, (value,) in series:
            plain.add_metric(labels, value)
        return plain


class _Collector:
    """What a registry of prometheus_client asks: makes a family when the one before has been written."""

    def __init__(self, make: Callable[[Family, Values], "Metric"], values: Values) -> None:
        self._make = make
        self._values = values

    def collect(self) -> Iterator["Metric"]:
        """The metrics that have samples."""
        for family in FAMILIES:
            made = self._make(family, self._values)
            if made.samples:
                yield made


def _present(own: Snapshot, merged: Snapshot, silent: int) -> Values:
    """What is so now. merged: of all processes that have answered. silent: how many have not."""
    found: Values = {}
    process = merged.process
    for proxy in merged.proxies:
        waiting = [listener.waiting for listener in proxy.listeners if listener.waiting is not None]
        note(found, "rspd_open_connections", proxy.open, proxy.name)
        if not proxy.retired:
            note(found, "rspd_max_connections", proxy.most, proxy.name)
        if waiting:
            note(found, "rspd_backlog", sum(waiting), proxy.name)
    for pool in merged.pools:
        note(found, "rspd_queue_length", pool.queue, pool.proxy, pool.name)
    for backend in merged.backends:
        labels = backend.proxy, backend.pool, backend.name
        note(found, "rspd_backend_connections", backend.open, *labels)
        # Of several processes, `in_service` is about the one for which the backend is worst.
        serving = backend.in_service_in if process.processes > 1 else int(backend.in_service)
        note(found, "rspd_backend_up_processes", serving, *labels)
        note(found, "rspd_backend_out", not serving, *labels)
    # Two with the same labels, one of the file and one of a proxy, are one; it is up if both are.
    out = found.pop("rspd_backend_out", {})
    found["rspd_backend_up"] = {labels: (not any(values),) for labels, values in out.items()}
    note(found, "rspd_config_last_reload_successful", not process.failure)
    note(found, "rspd_descriptors", process.descriptors)
    note(found, "rspd_descriptors_max", process.descriptors_max)
    note(found, "rspd_processes", process.processes, "answering")
    note(found, "rspd_processes", silent, "silent")
    note(found, "rspd_start_time_seconds", round(own.process.now - own.process.service_age))
    note(found, "rspd_build_info", 1, own.process.version)
    return found


def _read_all(
    asked: dict[int, tuple[str, Question]], begin_until: float, end: float, answers: dict[str, Snapshot]
) -> set[str]:
    """Read answers as they come, until so long for their beginnings, and for all. Returns who has begun too late."""
    poll = select.poll()
    for fd in asked:
        poll.register(fd, select.POLLIN)
    while asked and (left := end - time.monotonic()) > 0:
        ready = poll.poll(1000 * max(min(left, begin_until - time.monotonic()), 0))
        if not ready:
            break
        fd = ready[0][0]
        poll.unregister(fd)
        path, question = asked.pop(fd)
        with suppress(*UNANSWERED):
            answers[path] = read(Snapshot, question.answer(PATIENCE))
    return {asked[fd][0] for fd, _ in poll.poll(0)}
