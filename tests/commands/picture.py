"""The picture of `rspd top` in the documentation, of a moment that is made up.

python -m tests.commands.picture > docs/top.svg
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import accumulate
from math import sin

from rspd.admin.rates import Rates
from rspd.commands.screen import Seen, View, draw
from rspd.commands.tables import ALARM, BAD, BAR, BOLD, FAINT, WARN, Line
from rspd.commands.troubles import troubles
from rspd.snapshot import (
    Backend,
    Connection,
    Connections,
    Distribution,
    Listener,
    Pool,
    Process,
    Proxy,
    Rate,
    Snapshot,
    Volume,
)

HEIGHT, WIDTH = 24, 80

SECONDS, DEATH, NOW = 62, 50, 1_790_000_000.0  # of looks; at which second one server dies; when it is

REASON = "Connection refused"

# Pixels.
WIDE, HIGH, EDGE = 8.4, 18, 12

STYLES = {BOLD: "b", BAD: "b r", WARN: "b y", BAR: "i", ALARM: "b i", FAINT: "f"}

CSS = """\
text{font:14px ui-monospace,"DejaVu Sans Mono",Menlo,Consolas,monospace;fill:#d7dce2;white-space:pre}
.b{font-weight:bold}.r{fill:#ff6b68}.y{fill:#e5c07b}.f{fill:#8b949e}.i{fill:#14181d}"""

_WEB = ("10.0.0.11:80", "10.0.0.12:80")


def _begun(second: int) -> tuple[int, int]:
    """How many connections both servers got up to a second; the second one dies, and the first gets all."""
    each = [round(42 + 14 * sin(at / 7) + 5 * sin(at)) for at in range(second)]
    first = accumulate((one if at < DEATH else 2 * one for at, one in enumerate(each)), initial=900_000)
    return list(first)[-1], 850_000 + sum(each[:DEATH])


def _connect(begun: int) -> Distribution:
    return Distribution((0, 0, begun // 2, begun // 3, begun // 6, begun // 80, *[0] * 9), begun * 0.003)


def _moment(second: int) -> Snapshot:
    process = Process("0.3.0", 4711, origin="k3", lineage="k3", now=NOW, age=277_000.0, service_age=277_000.0)
    up, down = _begun(second)
    dead = second > DEATH
    web = Proxy(
        "web",
        listeners=(Listener("0.0.0.0:80"),),
        open=43,
        most=200,
        accepted=up + down,
        last_10s=Rate(84.0, 90e3, 17e6),
        volumes=(Volume(_WEB[0], up * 1_100, up * 212_000), Volume(_WEB[1], down * 1_100, down * 208_000)),
    )
    git = Proxy(
        "git",
        listeners=(Listener("0.0.0.0:2222"),),
        open=3,
        most=20,
        accepted=8_000 + second // 20,
        volumes=(Volume("10.0.0.5:22", second * 700, second * 31_000),),
    )
    backends = (
        Backend("web", name=_WEB[0], state_age=277_000.0, open=43, chosen=up, connect=_connect(up)),
        Backend(
            "web",
            name=_WEB[1],
            state="down" if dead else "up",
            state_age=float(second - DEATH if dead else 90_000),
            why=REASON if dead else "",
            chosen=down,
            connect=_connect(down),
        ),
        Backend(
            "git", name="10.0.0.5:22", state_age=277_000.0, open=3, chosen=8_000 + second // 20, connect=_connect(80)
        ),
    )
    return Snapshot(process, (web, git), pools=(Pool("web"), Pool("git")), backends=backends)


# Client, backend, seconds since it came, seconds without a byte, bytes both ways, bytes a second.
_OPEN = (
    ("192.0.2.77:50312", _WEB[0], 1_312.0, 1_309.0, 412, 0, 0.0),
    ("198.51.100.4:41870", "10.0.0.5:22", 7_940.0, 212.0, 184_000, 2_310_000, 0.0),
    ("198.51.100.9:60112", "10.0.0.5:22", 640.0, 14.0, 22_400, 91_000, 3.0),
    ("203.0.113.21:53240", _WEB[0], 49.0, 8.0, 5_120, 1_840_000, 0.0),
    ("203.0.113.8:39966", _WEB[0], 36.0, 5.0, 2_048, 640_000, 0.0),
    ("2001:db8::7:51422", _WEB[0], 31.0, 3.0, 1_310, 88_000, 0.0),
    ("192.0.2.14:47704", _WEB[0], 310.0, 0.4, 1_900, 3_420_000_000, 11_200_000.0),
    ("203.0.113.90:33180", _WEB[0], 12.0, 0.3, 48_000_000, 1_200, 3_900_000.0),
    ("198.51.100.33:58514", _WEB[0], 9.0, 0.2, 900, 2_700_000, 310_000.0),
    ("192.0.2.140:40022", _WEB[0], 4.0, 0.1, 780, 960_000, 240_000.0),
    ("203.0.113.17:36474", _WEB[0], 2.0, 0.1, 810, 410_000, 205_000.0),
    ("192.0.2.201:44780", _WEB[0], 1.2, 0.0, 640, 120_000, 98_000.0),
)


def lines() -> list[Line]:
    """The screen."""
    rates = Rates()
    for second in range(SECONDS + 1):
        snapshot = _moment(second)
        rates.note(snapshot, 1_000.0 + second)
    found = [
        Connection(f"k3-{number:x}", "", client, "", backend, "", "", "open", age, idle, sent, received, rate)
        for number, (client, backend, age, idle, sent, received, rate) in enumerate(_OPEN)
    ]
    seen = Seen(snapshot, Connections(snapshot.process, 46, tuple(found)), troubles(snapshot))
    return draw(seen, rates, View(sort="idle"), HEIGHT, WIDTH).lines


def svg(screen: Sequence[Line]) -> str:
    """A screen as a picture."""
    width, height = WIDTH * WIDE + 2 * EDGE, len(screen) * HIGH + 2 * EDGE
    size = f'width="{width:.0f}" height="{height}"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size} viewBox="0 0 {width:.0f} {height}" role="img">',
        "<title>rspd top: two web servers under load, of which one has just died</title>",
        f"<style>{CSS}</style>",
        '<rect width="100%" height="100%" rx="8" fill="#14181d"/>',
    ]
    for number, line in enumerate(screen):
        top = EDGE + number * HIGH
        if line.style in (BAR, ALARM):
            colour = "#ff6b68" if line.style == ALARM else "#aab3bd"
            parts.append(f'<rect x="{EDGE}" y="{top}" width="{WIDTH * WIDE:.0f}" height="{HIGH}" fill="{colour}"/>')
        text = line.text.rstrip()
        if text:
            style = f' class="{STYLES[line.style]}"' if line.style in STYLES else ""
            # The length holds the columns together, whatever the font of who looks at it.
            where = f'x="{EDGE}" y="{top + 13}" textLength="{len(text) * WIDE:.1f}" lengthAdjust="spacingAndGlyphs"'
            parts.append(f'<text {where} xml:space="preserve"{style}>{escape(text, quote=False)}</text>')
    return "\n".join([*parts, "</svg>", ""])


if __name__ == "__main__":
    print(svg(lines()), end="")
