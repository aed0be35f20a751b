"""What a service has counted: sums over its processes that never go back, whatever becomes of a worker."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from operator import gt
from reprlib import repr as shortened
from typing import Any

from rspd.histogram import fits, rows
from rspd.snapshot import OTHER, Backend, Distribution, Proxy, Snapshot

# Values by the names of metrics and by their labels. A histogram has the counts of its buckets, and their sum last.
Values = dict[str, dict[tuple[str, ...], tuple[float, ...]]]

# Of workers that each reload the same file, the largest number is that of the service.
LARGEST = ("rspd_reloads_total",)

# Of backends and routes, which a reload may take out. If no process has one any more, its counters end too.
PASSING = ("rspd_routed_total", "rspd_connect_failures_total", "rspd_backend_checks_total", "rspd_connect_seconds")

# By proxy, backend and something else. A process adds what it has of backends that are long gone to that of OTHER.
FOLDED = ("rspd_connections_total", "rspd_bytes_total")

# Sums of seconds are cut to whole parts of a second, a power of 2. Up to 4,000 years such numbers are added without
# rounding, so that a sum never goes back because it is added in another order.
PER_SECOND, MOST_SECONDS = 1 << 16, 1e11

# The path of the process that asks, among those of workers.
OWN = ""


class History:
    """The counters of a service. What a worker has counted stays, if the worker does not answer now, or begins anew.

    `take` and `sums` are called in one thread at a time. `hand_over` may be called meanwhile in another one.
    """

    def __init__(self) -> None:
        # Replaced, never changed. What nobody goes on from; and by path, the lineage of the process that answered there
        # last, and its counters. A lineage is at one path.
        self._state: tuple[Values, Mapping[str, tuple[str, Values]]] = {}, {}

    def take(self, own: Snapshot, workers: Mapping[str, Snapshot]) -> None:
        """Take what this process says now, and what workers say, by the paths of their control sockets."""
        ended, known = self._state
        paths = {own.process.lineage: OWN}
        now = {own.process.lineage: counted(own)}
        for path, answer in workers.items():
            paths[answer.process.lineage] = path
            now[answer.process.lineage] = counted(answer)
        silent: dict[str, tuple[str, Values]] = {}
        for path, (lineage, before) in known.items():
            if lineage in now:
                # It may answer at another path: a reload can change `control`.
                ended = add((ended, _began_anew(before, now[lineage])))
            elif path == OWN or path in workers:
                ended = add((ended, before))
            else:
                silent[path] = lineage, before
        known = {path: (lineage, now[lineage]) for lineage, path in paths.items()} | silent
        # A process alone says what it has: there is no sum that could go back.
        self._state = _without_gone(ended, known) if len(known) > 1 else self._state[0], known

    def sums(self) -> Values:
        """The counters of all processes together."""
        ended, known = self._state
        return add((*(values for _, values in known.values()), ended))

    def hand_over(self) -> Any:
        """What `resume` takes in the next process, as a value for JSON; empty if there were no workers."""
        ended, known = self._state
        if not known.keys() - {OWN}:
            return {}
        parts = {path: {"lineage": lineage, "counted": _plain(values)} for path, (lineage, values) in known.items()}
        return {"ended": _plain(ended), "workers": parts}

    def resume(self, value: Any) -> None:
        """Go on from what the process before has handed over. Raises ValueError if it does not fit."""
        try:
            parts = value["workers"].items()
            workers = {path: ("" + part["lineage"], _read(part["counted"])) for path, part in parts}
            self._state = _read(value["ended"]), workers
        except (AttributeError, LookupError, TypeError):
            raise ValueError(f"expected counters by worker, found {shortened(value)}") from None


def counted(snapshot: Snapshot) -> Values:
    """All that only goes up."""
    found: Values = {}
    process = snapshot.process
    note(found, "rspd_reloads_total", process.reloads, "ok")
    note(found, "rspd_reloads_total", process.reloads_failed, "failed")
    note(found, "rspd_handovers_total", process.handovers)
    _note_all(found, "rspd_loop_turn_seconds", process.turns)
    for proxy in snapshot.proxies:
        _count_proxy(found, proxy)
    for route in snapshot.routes:
        note(found, "rspd_routed_total", route.clients, route.proxy, route.name)
    for backend in snapshot.backends:
        _count_backend(found, backend)
    return found


def _count_proxy(found: Values, proxy: Proxy) -> None:
    name = proxy.name
    note(found, "rspd_accepted_total", proxy.accepted, name)
    for refused in proxy.refused:
        note(found, "rspd_refused_total", refused.number, name, refused.reason)
    for ends in proxy.ends:
        note(found, "rspd_connections_total", ends.number, name, ends.backend, ends.cause)
    for volume in proxy.volumes:
        note(found, "rspd_bytes_total", volume.sent, name, volume.backend, "upload")
        note(found, "rspd_bytes_total", volume.received, name, volume.backend, "download")
    _note_all(found, "rspd_connection_seconds", proxy.seconds, name)
    _note_all(found, "rspd_queue_seconds", proxy.queue_seconds, name)


def _count_backend(found: Values, backend: Backend) -> None:
    labels = backend.proxy, backend.pool, backend.name
    note(found, "rspd_connect_failures_total", backend.failed, *labels)
    if backend.checks:
        note(found, "rspd_backend_checks_total", backend.checks.good, *labels, "good")
        note(found, "rspd_backend_checks_total", backend.checks.bad, *labels, "bad")
    _note_all(found, "rspd_connect_seconds", backend.connect, *labels)


def note(found: Values, name: str, value: float, *labels: str) -> None:
    """Add a value to those of a metric. Two things with the same labels are one, for no labels may come twice."""
    _join(found.setdefault(name, {}), tuple(map(_text, labels)), (value,))


def _note_all(found: Values, name: str, distribution: Distribution, *labels: str) -> None:
    if distribution.counts:
        total = int(min(distribution.total, MOST_SECONDS) * PER_SECOND) / PER_SECOND
        _join(found.setdefault(name, {}), tuple(map(_text, labels)), (*distribution.counts, total))


def _text(value: str) -> str:
    """A label. What is not Unicode, as a byte of a path may be, is written as an escape."""
    return value if value.isascii() else value.encode(errors="backslashreplace").decode()


def _join(series: dict[tuple[str, ...], tuple[float, ...]], labels: tuple[str, ...], values: tuple[float, ...]) -> None:
    known = series.get(labels)
    if not known:
        series[labels] = values
    elif len(known) == len(values):
        series[labels] = tuple(map(sum, zip(known, values, strict=True)))


def add(parts: Iterable[Values]) -> Values:
    """The sums; of LARGEST, the largest values.

    A histogram with other buckets than the first has is left out: it is of another version of rspd.
    """
    found: Values = {}
    for part in parts:
        for name, series in part.items():
            sums = found.setdefault(name, {})
            for labels, values in series.items():
                if name in LARGEST:
                    sums[labels] = max(values, sums.get(labels, values))
                else:
                    _join(sums, labels, values)
    return found


def _began_anew(before: Values, now: Values) -> Values:
    """What a process had counted in series that it has no more, or that count from 0 again."""
    found: Values = {}
    for name, series in before.items():
        present = now.get(name, {})
        for labels, values in series.items():
            later = present.get(labels, ())
            if len(later) != len(values) or any(map(gt, values, later)):
                found.setdefault(name, {})[labels] = values
        if name in FOLDED and name in found:
            _uncount_folded(found[name], series, present)
    return found


def _uncount_folded(
    found: dict[tuple[str, ...], tuple[float, ...]],
    before: Mapping[tuple[str, ...], tuple[float, ...]],
    now: Mapping[tuple[str, ...], tuple[float, ...]],
) -> None:
    """Take away from OTHER what is found of backends, if the process has added it there."""
    for labels, (value, *_) in list(found.items()):
        other = labels[0], OTHER, *labels[2:]
        risen = sum(now.get(other, ())) - sum(before.get(other, ())) + sum(found.get(other, ()))
        if labels != other and value <= risen:
            _join(found, other, (-value,))


def _without_gone(ended: Values, known: Mapping[str, tuple[str, Values]]) -> Values:
    """Without what is of backends and routes that no process has any more. Their ends and bytes are those of OTHER."""
    kept = dict(ended)
    for name in PASSING:
        present = set[tuple[str, ...]]().union(*(values.get(name, ()) for _, values in known.values()))
        kept[name] = {labels: values for labels, values in ended.get(name, {}).items() if labels in present}
    members = {labels[2] for _, values in known.values() for labels in values.get("rspd_connect_failures_total", ())}
    for name in FOLDED:
        there = {labels[1] for _, values in known.values() for labels in values.get(name, ())} | members | {"-"}
        kept[name] = {}
        for labels, values in ended.get(name, {}).items():
            _join(kept[name], labels if labels[1] in there else (labels[0], OTHER, *labels[2:]), values)
    return kept


def _plain(values: Values) -> dict[str, list[Any]]:
    """For JSON: by the names of metrics, labels and values of all series that are not zero.

    Zeros of PASSING stay, for they say that the process has the backend or the route.
    """
    return {
        name: [[list(labels), list(each)] for labels, each in series.items() if name in PASSING or any(each)]
        for name, series in values.items()
    }


def _read(value: Mapping[str, Iterable[Any]]) -> Values:
    """As of `_plain`. What nobody goes on from may be below zero: see `_uncount_folded`."""
    found: Values = {}
    for name, series in value.items():
        found[name] = {}
        for labels, each in rows(series, list, list):
            if not all(fits(label, str) for label in labels) or not all(fits(abs(number), float) for number in each):
                raise ValueError(f"expected texts, and numbers, found {shortened([labels, each])}")
            found[name][tuple(map(_text, labels))] = tuple(each)
    return found
