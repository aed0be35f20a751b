"""Figures as tables in Markdown and a picture in SVG."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from bench.peers import CONNECTIONS, DIRECT, HAPROXY, OTHER, RSPD, SERIAL, SOCKET_PROXYD_NAME
from bench.targets import TARGETS, Run, full_burst, middle, ratios
from bench.works import BESIDE, BESIDE_DOWN, FOUR_64, OWN_RUN, PROCESSES, TURNS, UNANSWERED, Results, rounds_told

BEGIN, END = "<!-- made by python -m bench -->", "<!-- end of what python -m bench made -->"

ONE_BACKEND = "one backend only"


@dataclass(frozen=True)
class Column:
    """A figure of a table: its heading, what it is multiplied by, and its decimals."""

    figure: str
    heading: str
    factor: float = 1.0
    decimals: int = 1
    spread: bool = False  # beside the median, smallest to largest
    compared: bool = False  # rspd ÷ it
    ceiling: float = inf  # measuring stopped there: the true figure is larger

    def show(self, values: Sequence[float]) -> str:
        """The median of the rounds."""
        return self._one(median(values))

    def show_spread(self, values: Sequence[float]) -> str:
        """The smallest and the largest."""
        low, high = min(values), max(values)
        return "-" if low >= self.ceiling else f"{self._one(low)} to {self._one(high)}"

    def _one(self, value: float) -> str:
        return bounded(value, self.ceiling, self.factor, self.decimals)


def _cpu(unit: str) -> Column:
    if unit == "GB":
        return Column("cpu", "CPU s per GB", 1, 3, True, True)
    return Column("cpu", f"CPU µs per {unit}", 1e6, 1, True, True)


LOAD = Column("load", "load and backend, CPUs", 1, 2)
BUSY = Column("busy", "busy, CPUs", 1, 2)


def columns(key: str, results: Results) -> list[Column]:
    """What the table of a work shows."""
    if key == "idle":
        return [
            Column("memory", "bytes per idle connection", 1, 0, True, True),
            Column("none", "CPU µs per new connection, none open", 1e6),
            Column("open", "the same beside the idle ones", 1e6),
            Column("growth", "with ÷ without", 1, 2, True),
        ]
    if key in (BESIDE, BESIDE_DOWN):
        meanwhile = ("GB/s of the downloads", 1, 2) if results.unit == "GB" else ("answers/s of the busy", 1, 0)
        return [
            Column("p99", "p99, ms", 1e3, 1, True, True, UNANSWERED),
            Column("p50", "p50, ms", 1e3, 1, False, True, UNANSWERED),
            Column("all", "until all have an answer, ms", 1e3, 1, False, True, UNANSWERED),
            Column("answered", "answered", 1, 0),
            Column("again", "sent again", 1, 0),
            Column("meanwhile", *meanwhile),
            _cpu(results.unit),
        ]
    if key == "start":
        return [
            Column("seconds", "ms until the first answer", 1e3, 1, True, True),
            Column("memory", "memory then, MB (Pss)", 1e-6, 1),
            Column("resident", "resident then, MB (Rss)", 1e-6, 1),
        ]
    if key == TURNS:
        return [
            Column("cpu_longest", "longest, ms of CPU time", 1e3, 2, True),
            Column("wall_longest", "longest, ms of wall time", 1e3, 2, True),
            Column("turns", "turns", 1, 0),
            Column("cpu_over", "over 1 ms of CPU time", 1, 0),
            Column("wall_over", "over 1 ms of wall time", 1, 0),
        ]
    rate = Column("rate", "GB/s", 1, 2) if results.unit == "GB" else Column("rate", f"{results.unit}s/s", 1, 0)
    if key == "rate":
        return [
            Column("p99", "p99, µs", 1e6, 0, True, True),
            Column("p50", "p50, µs", 1e6, 0),
            Column("max", "largest, µs", 1e6, 0),
            rate,
            _cpu(results.unit),
            BUSY,
        ]
    if key.startswith(PROCESSES):
        rate = Column("rate", f"{results.unit}s/s", 1, 0, True)
        shares = [Column("most", "the most, %", 100, 1, True), Column("least", "the least, %", 100, 1, True)]
        return [rate, *shares, BUSY, LOAD, _cpu(results.unit)]
    return [_cpu(results.unit), rate, BUSY, LOAD]


def number(value: float, decimals: int) -> str:
    """With commas between thousands."""
    return f"{value:,.{decimals}f}"


def bounded(value: float, ceiling: float, factor: float, decimals: int) -> str:
    """A figure times the factor; if it has reached the ceiling, that it is more than this."""
    return f"over {number(ceiling * factor, decimals)}" if value >= ceiling else number(value * factor, decimals)


def load(folder: Path) -> tuple[dict[str, Any], Run]:
    """What results.json says: about the run, and its works."""
    raw = json.loads((folder / "results.json").read_text())
    return raw["about"], {key: Results(**value) for key, value in raw["works"].items()}


def write(folder: Path, image: Path) -> str:
    """Write results.md from results.json in the folder, and the picture. Returns the table of docs/speed.md."""
    about, run = load(folder)
    image.write_text(picture(about, run))
    (folder / "results.md").write_text(markdown(about, run, os.path.relpath(image, folder)))
    return summary(about, run)


def markdown(about: dict[str, Any], run: Run, image: str) -> str:
    """All of it, for whoever wants to know, with a link to the picture."""
    lines = ["# rspd and its peers, side by side", ""]
    lines += [f"Made by `python -m bench`, {about['date']}, on {describe(about)}", ""]
    for warning in _warnings(about):
        lines += [warning, ""]
    versions = ", ".join(f"{name} {version}" for name, version in about["versions"].items())
    lines += [
        f"Versions: {versions}.",
        "",
        "Figures are medians of the rounds. *smallest to largest* is of the figures of the rounds.",
        "*rspd ÷ it* is a ratio for each round: rspd's figure ÷ the contestant's. Its median is shown, and in brackets",
        "its smallest and largest. Below 1, rspd is cheaper or quicker. CPUs *busy* is CPU time over wall time.",
        "[How it was done, and the limits](../README.md).",
        "",
        f"![bars]({image})",
        "",
        "## Targets",
        "",
        *targets_table(run),
    ]
    for key, results in run.items():
        lines += ["", f"## {results.title}", "", *table(columns(key, results), results)]
        lines += ["", *results.notes] if results.notes else []
    return "\n".join(lines) + "\n"


def describe(about: dict[str, Any]) -> str:
    """The machine, in a sentence."""
    kind = "a virtual machine with" if about["virtual"] else "a machine with"
    minutes = f"{about['minutes']} minutes" if about["minutes"] > 1 else "a minute at most"
    return (
        f"{kind} {about['cpus']} CPUs ({about['cpu']}), kernel {about['kernel']}, {about['system']}, "
        f"Python {about['python']}; {rounds_told(about['rounds'])}, {minutes}."
    )


def targets_table(run: Run) -> list[str]:
    """Each target, what this run says, and whether that meets it."""
    lines = ["| target | at most | measured | met |", "| --- | ---: | ---: | --- |"]
    for target in TARGETS:
        value = target.measured(run)
        shown = "not measured"
        if value is not None:
            spread = _spread(target.found(run), partial(_short, most=target.most))
            shown = f"{_short(value, target.most)}{spread}{target.unit}"
            shown += ", says nothing" * bool(target.hidden(run))
        most = f"{target.most:,g}{target.unit}" + (" (aim)" if target.aim else "")
        lines.append(f"| {target.text} | {most} | {shown} | {target.verdict(run)} |")
    return lines


def _spread(values: Sequence[float], show: Callable[[float], str]) -> str:
    """Smallest to largest, in brackets; nothing if there is one only."""
    return f" ({show(min(values))} to {show(max(values))})" if len(values) > 1 else ""


def _short(value: float, most: float) -> str:
    """With so many decimals that it is seen on which side of the limit it is."""
    decimals = 0 if value >= 1000 else 1 if value >= 10 else 2
    while (round(value, decimals) <= most) != (value <= most):
        decimals += 1
    return number(value, decimals)


def table(wanted: Sequence[Column], results: Results) -> list[str]:
    """rspd first, then the others from the best on, then who takes no part, then who failed."""
    headings = ["contestant"]
    for column in wanted:
        headings += [column.heading]
        headings += ["smallest to largest"] * column.spread + ["rspd ÷ it"] * column.compared
    lines = ["| " + " | ".join(headings) + " |", "| --- |" + " ---: |" * (len(headings) - 1)]
    first = wanted[0].figure
    sign = -1 if first == "rate" else 1

    def place(name: str) -> tuple[bool, bool, float]:
        values = [figures[first] for figures in results.rounds[name] if first in figures]
        return name != RSPD, not values, sign * median(values) if values else 0

    for name in sorted(results.rounds, key=place):
        cells = [f"**{name}**" if name == RSPD else name]
        for column in wanted:
            values = [figures[column.figure] for figures in results.rounds[name] if column.figure in figures]
            cells += [column.show(values) if values else "-"]
            cells += [column.show_spread(values) if values else "-"] * column.spread
            cells += [_compared(results, name, column)] * column.compared
        lines.append("| " + " | ".join(cells) + " |")
    without = dict.fromkeys(results.absent, f"takes no part: {ONE_BACKEND}")
    without |= {name: f"failed: {why.replace('|', '/')}" for name, why in results.failed.items()}
    lines += [f"| {name} | {why} |" + " |" * (len(headings) - 2) for name, why in without.items()]
    return lines


def _compared(results: Results, name: str, column: Column) -> str:
    if name == RSPD:
        return "1"
    found = _ratios({"": results}, "", name, column.figure, column.ceiling)
    return f"{median(found):.2f}{_spread(found, lambda ratio: f'{ratio:.2f}')}" if found else "-"


def _ratios(run: Run, work: str, name: str, figure: str, ceiling: float) -> list[float]:
    """rspd ÷ the contestant in each round; nothing if one of the two has no figures, or is only a bound."""
    try:
        if max(middle(run, work, who, figure) for who in (RSPD, name)) < ceiling:
            return ratios(run, work, RSPD, name, figure)
    except KeyError:
        pass
    return []


# -- what docs/speed.md and the picture show -------------------------------------------------------------------------


@dataclass(frozen=True)
class Panel:
    """One of the small pictures, and a row of the table in docs/speed.md."""

    key: str
    figure: str
    title: str
    unit: str
    factor: float
    decimals: int
    ceiling: float = inf  # measuring stopped there: the true figure is larger
    drawn: bool = True  # otherwise a row of the table only: pictures come in pairs

    def show(self, value: float) -> str:
        """A median, in the unit."""
        return bounded(value, self.ceiling, self.factor, self.decimals)


PANELS = [
    Panel("down-1", "cpu", "Download, 1 stream", "CPU s per GB", 1, 2),
    Panel("up-1", "cpu", "Upload, 1 stream", "CPU s per GB", 1, 2),
    Panel("new-64", "cpu", "New connection", "CPU µs, 64 at a time", 1e6, 0),
    Panel("new-64-logs", "cpu", "New connection with a log line", "CPU µs, 64 at a time", 1e6, 0),
    Panel("ab-64", "cpu", "New connection of ab to a web server", "CPU µs, 64 at a time", 1e6, 0, drawn=False),
    Panel(FOUR_64, "cpu", "New connection, four backends", "CPU µs, 64 at a time", 1e6, 0, drawn=False),
    Panel("requests-16", "cpu", "Kept-alive request", "CPU µs, 16 connections", 1e6, 1),
    Panel("rate", "p99", "Latency, p99", "ms, at half of nginx's top rate", 1e3, 2),
    Panel(BESIDE, "p99", "New connection beside 1,000 busy", "ms, p99 of 400", 1e3, 0, UNANSWERED),
    Panel(BESIDE_DOWN, "p99", "New connection beside 300 downloads", "ms, p99 of 400", 1e3, 0, UNANSWERED),
    Panel("idle", "memory", "Idle connection", "KB of its memory", 1e-3, 1),
    Panel("start", "seconds", "Start", "ms until the first answer", 1e3, 0),
]
# Why rspd loses a row, whoever wins it.
PIECES = "Python decides on each piece of data"
QUEUE = "rspd accepts at most 64 clients in a turn of its loop, and serves the busy ones in between"
WHY = {
    "down-1": PIECES,
    "up-1": PIECES,
    "new-64": "rspd runs some 2,500 bytecode instructions of Python for each connection",
    "new-64-logs": "rspd runs the instructions of a new connection, and Python makes the line too",
    "ab-64": "rspd passes the web server's end on, and waits for the client's before it closes",
    FOUR_64: "rspd runs the instructions of a new connection, and Python chooses the backend too",
    "requests-16": "rspd runs some 500 bytecode instructions of Python for each request",
    "rate": "a request waits for those before it in the same turn of the loop, and Python takes longer for each",
    BESIDE: QUEUE,
    BESIDE_DOWN: QUEUE,
    "idle": "rspd keeps some objects of Python for each connection",
    "start": "Python starts first, and then imports what rspd needs",
}
# The same, if socket-proxyd wins it.
SPLICES = "rspd first reads, to see whether splicing pays; socket-proxyd always splices"
PROXYD_WHY = {
    "down-1": SPLICES,
    "up-1": SPLICES,
    "idle": "socket-proxyd keeps its buffers in pipes, which are memory of the kernel and not counted",
}
WHY_SERIAL = (
    "rspd sleeps once more for each connection, since it waits for the backend's end before it accepts the next client"
)
LEVEL = 1.03  # so close is level: the noise of a run is larger

HIDDEN = (SERIAL, OTHER, DIRECT)


def values_of(panel: Panel, run: Run) -> dict[str, float]:
    """The medians of a panel, from the best on; none if what was measured is not what its title says."""
    if panel.key not in run or (panel.key in (BESIDE, BESIDE_DOWN) and not full_burst(run, panel.key)):
        return {}
    found = {
        name: middle(run, panel.key, name, panel.figure)
        for name in run[panel.key].rounds
        if name not in (*HIDDEN, *run[panel.key].silent)
    }
    return dict(sorted(found.items(), key=lambda item: item[1]))


def summary(about: dict[str, Any], run: Run) -> str:
    """The table of docs/speed.md, and what it does not show."""
    names = [name for name in about["versions"] if name not in HIDDEN]
    lines = ["| | " + " | ".join(names) + " |", "| --- |" + " ---: |" * len(names)]
    rows: list[tuple[Panel, dict[str, float]]] = []
    for panel in PANELS:
        values = {name: value for name, value in values_of(panel, run).items() if name in names}
        if RSPD not in values:
            continue
        rows.append((panel, values))
        best = winners(panel, values, run)
        cells = []
        for name in names:
            if name not in values:
                cells.append(_absent(panel, run).get(name, "not measured"))
                continue
            shown = panel.show(values[name])
            cell = f"**{shown}**" if name in best else shown
            cells.append(cell if name == RSPD else cell + _ratio(panel, run, name))
        lines.append(f"| {panel.title}, {panel.unit} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "Figures are medians. The best of each row is bold, and who is within 3 % of it, by the ratios.",
        "In brackets is rspd ÷ the contestant, the median over the rounds: below 1, rspd is cheaper or quicker.",
        "",
        *_standing(rows, run),
        "",
        *_serial(run),
        *_turns(run),
        *_price(run),
        *_later(run),
        "What rspd is to reach, and whether it does, stands in `bench/results/results.md` in the source (*Targets*).",
        f"Made on {describe(about)}",
        *_warnings(about),
    ]
    return "\n".join(lines) + "\n"


def winners(panel: Panel, values: dict[str, float], run: Run) -> list[str]:
    """Who has the best figure, and who is level with it, by the ratios that are shown.

    A ratio compares figures of the same round, so it may differ from that of the medians. Where rspd has only a bound,
    there are no ratios: then those win whose medians are shown as the best. Nobody wins if all are only bounds.
    """
    if values[RSPD] >= panel.ceiling:
        best = min(values.values())
        shown = panel.show(best)
        return [] if best >= panel.ceiling else [name for name in values if panel.show(values[name]) == shown]
    found = {name: _ratios(run, panel.key, name, panel.figure, panel.ceiling) for name in values}
    times = {name: round(median(each), 2) for name, each in found.items() if each} | {RSPD: 1.0}
    return [name for name, time in times.items() if time * LEVEL >= max(times.values())]


def _ratio(panel: Panel, run: Run, name: str) -> str:
    """rspd ÷ the contestant, in brackets; nothing if one of the two is only a bound."""
    found = _ratios(run, panel.key, name, panel.figure, panel.ceiling)
    return f" ({median(found):.2f})" if found else ""


def _standing(rows: Sequence[tuple[Panel, dict[str, float]]], run: Run) -> list[str]:
    """Which rows rspd wins, and to whom it loses the others, by how much, and why; not where it is alone."""
    won, level = [], []
    lost: dict[str, list[str]] = {}  # rows by their reason
    for panel, values in rows:
        best = winners(panel, values, run) if len(values) > 1 else []
        title = f"*{panel.title}*"
        others = " and ".join(name + _ratio(panel, run, name) for name in best if name != RSPD)
        if best == [RSPD]:
            won.append(title)
        elif RSPD in best:
            level.append(f"{title} with {others}")
        elif best:
            lost.setdefault(_why(panel, best), []).append(f"{title} to {others}")
    lines = [f"rspd wins {'; '.join(won)}."] if won else []
    lines += [f"rspd is level in {'; '.join(level)}."] if level else []
    told = [f"- {'; '.join(titles)}: {why}." for why, titles in lost.items()]
    return lines + (["rspd loses:", "", *told] if told else [])


def _why(panel: Panel, best: Sequence[str]) -> str:
    """Why rspd loses a row to these."""
    only_proxyd = list(best) == [SOCKET_PROXYD_NAME]
    return PROXYD_WHY.get(panel.key, WHY[panel.key]) if only_proxyd else WHY[panel.key]


def _serial(run: Run) -> list[str]:
    """What a new connection costs in serial mode, which the table does not show."""
    try:
        one, many = (number(1e6 * middle(run, work, SERIAL, "cpu"), 0) for work in ("new-1", "new-64"))
        ratio = median(ratios(run, "new-1", SERIAL, RSPD, "cpu"))
    except KeyError:
        return []
    room = f"rspd's figures are with room for many clients (`max_connections: {CONNECTIONS}`)"
    cost = f"a new connection costs {one} CPU µs one at a time, and {many} CPU µs 64 at a time"
    dearer = f"One at a time, that is {ratio:.2f} times as much as with room for many"
    lines = [f"{room}; in serial mode, its default, {cost}."]
    return lines + ([f"{dearer}: {WHY_SERIAL}."] if round(ratio, 2) > 1 else [])


def _turns(run: Run) -> list[str]:
    """How long rspd keeps a request waiting by its own work at most, beside the row of the latency."""
    try:
        count, cpu, wall = (middle(run, TURNS, RSPD, what) for what in ("turns", "cpu_longest", "wall_longest"))
    except KeyError:
        return []
    rounds, over = rounds_told(len(run[TURNS].rounds[RSPD])), number(middle(run, TURNS, RSPD, "wall_over"), 0)
    return [
        f"At the rate of *Latency, p99*, rspd's loop made {number(count, 0)} turns in a round.",
        f"The longest took {1e3 * cpu:.2f} ms of CPU time.",
        f"Turns of over a millisecond of wall time: {over}; the longest took {1e3 * wall:.2f} ms.",
        f"In wall time, the machine may have stopped rspd. These are medians of {rounds}.",
    ]


def _price(run: Run) -> list[str]:
    """What the busy ones pay for it that new connections are answered soon."""
    if not full_burst(run, BESIDE):
        return []
    try:
        rate, cpu = (median(ratios(run, BESIDE, RSPD, HAPROXY, figure)) for figure in ("meanwhile", "cpu"))
    except KeyError:
        return []
    meanwhile = f"rspd gave the busy ones {rate:.2f} times as many answers a second as HAProxy"
    price = f"over the whole of this work, rspd's CPU time for each answer was {cpu:.2f} times HAProxy's"
    return [f"While the new connections beside 1,000 busy ones waited, {meanwhile}; {price}."]


def _later(run: Run) -> list[str]:
    """Which rows of the table are of runs of their own, and of what day."""
    rows: dict[str, list[str]] = {}
    for panel in PANELS:
        for note in run[panel.key].notes if RSPD in values_of(panel, run) else []:
            if date := note.partition(OWN_RUN)[2][: len("2026-01-01")]:
                rows.setdefault(date, []).append(f"*{panel.title}*")
    told = "; ".join(f"{', '.join(titles)} ({date})" for date, titles in sorted(rows.items()))
    return [f"Measured later, in runs of their own: {told}."] if told else []


def _warnings(about: dict[str, Any]) -> list[str]:
    """Why not to trust the figures."""
    lines = []
    if about["quick"]:
        lines.append("**A smoke run (`--quick`): these figures say nothing about speed.**")
    if about["busy_before"] > 0.1:
        lines.append(f"**The machine was not quiet: {about['busy_before']:.2f} CPUs had other work before the run.**")
    return lines


def put_table(made: str, page: Path, begin: str = BEGIN, end: str = END) -> None:
    """Put the table between the marks of the page."""
    text = page.read_text()
    before, found, rest = text.partition(begin)
    if found and end in rest:
        page.write_text(f"{before}{begin}\n{made}{end}{rest.partition(end)[2]}")


WIDTH, MARGIN, GAP, LABEL, VALUE, BAR, STEP, HEAD = 880, 24, 36, 112, 74, 14, 21, 42
RSPD_COLOUR, COLOUR, INK, FAINT, PAPER = "#1d6fd1", "#bcc4ce", "#1c2530", "#5d6875", "#ffffff"


def picture(about: dict[str, Any], run: Run) -> str:
    """Small bar charts, two in a row; a bar of more than three times rspd's is cut off."""
    panels = [(panel, values_of(panel, run)) for panel in PANELS if panel.drawn]
    panels = [(panel, values) for panel, values in panels if RSPD in values]
    width = (WIDTH - 2 * MARGIN - GAP) // 2
    parts = []
    top = 92
    for index in range(0, len(panels), 2):
        pair = panels[index : index + 2]
        for column, (panel, values) in enumerate(pair):
            parts += _panel(panel, values, run, MARGIN + column * (width + GAP), top, width)
        rows = max(len(values) + len(_absent(panel, run)) for panel, values in pair)
        top += HEAD + rows * STEP + 18
    warnings = [warning.strip("*") for warning in _warnings(about)]
    height = top + 26 + 15 * len(warnings)
    style = "font-family='system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif'"
    described = f"{'virtual machine, ' if about['virtual'] else ''}{about['cpus']} CPUs, {about['cpu']}"
    size = f"width='{WIDTH}' height='{height}' viewBox='0 0 {WIDTH} {height}'"
    claim = "The shorter, the better. Medians; one processor for each proxy. // is a bar cut off."
    head = [
        f"<svg xmlns='http://www.w3.org/2000/svg' {size} {style}>",
        "<title>What rspd and its peers cost, as bars: shorter is better</title>",
        f"<rect x='0.5' y='0.5' width='{WIDTH - 1}' height='{height - 1}' rx='10' fill='{PAPER}' stroke='#d5dae0'/>",
        _text(MARGIN, 42, "What a TCP proxy costs", 22, INK, weight=700),
        _text(MARGIN, 66, claim, 14, FAINT),
    ]
    version = about["python"].partition(" ")[0]
    made = [f"{described}, kernel {about['kernel']}, Python {version}, {about['date'][:10]}", *warnings]
    foot = [_text(MARGIN, top + 8 + 15 * line, text, 11, FAINT) for line, text in enumerate(made)]
    return "\n".join([*head, *parts, *foot, "</svg>"]) + "\n"


def _absent(panel: Panel, run: Run) -> dict[str, str]:
    """Who has no bar, and what stands in its place."""
    results = run[panel.key]
    failed = {name: "failed" for name in results.failed if name not in HIDDEN}
    return dict.fromkeys(results.silent, "logs nothing") | dict.fromkeys(results.absent, ONE_BACKEND) | failed


def _panel(panel: Panel, values: dict[str, float], run: Run, left: int, top: int, width: int) -> list[str]:
    room = width - LABEL - VALUE
    longest = min(max(values.values()), 3 * values[RSPD])
    parts = [
        _text(left, top + 14, panel.title, 15, INK, weight=600),
        _text(left + width, top + 14, panel.unit, 12, FAINT, anchor="end"),
        f"<line x1='{left}' y1='{top + 23}' x2='{left + width}' y2='{top + 23}' stroke='#e3e7ec'/>",
    ]
    y = top + HEAD - 8
    for name, value in values.items():
        ours = name == RSPD
        length = max(1.5, room * min(1.0, value / longest))
        ink, weight = (RSPD_COLOUR, 700) if ours else (INK, 400)
        fill = RSPD_COLOUR if ours else COLOUR
        parts += [
            _text(left + LABEL - 8, y + 11, name, 12, ink, weight=weight, anchor="end"),
            f"<rect x='{left + LABEL}' y='{y}' width='{length:.1f}' height='{BAR}' rx='2' fill='{fill}'/>",
        ]
        if value > longest:
            cut = left + LABEL + length - 16
            parts += [
                f"<path d='M{cut + shift} {y + BAR + 2} l5 -{BAR + 4}' stroke='{PAPER}' stroke-width='2.5'/>"
                for shift in (0, 6)
            ]
        x = left + LABEL + length + 6
        parts.append(_text(x, y + 11, panel.show(value), 12, ink, weight=weight))
        y += STEP
    for name, why in _absent(panel, run).items():
        parts += [
            _text(left + LABEL - 8, y + 11, name, 12, INK, anchor="end"),
            _text(left + LABEL, y + 11, why, 12, FAINT),
        ]
        y += STEP
    return parts


def _text(x: float, y: float, text: str, size: int, fill: str, weight: int = 400, anchor: str = "start") -> str:
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' font-weight='{weight}' fill='{fill}' "
        f"text-anchor='{anchor}'>{escape(text)}</text>"
    )
