from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from math import inf, nan

import pytest

from rspd.commands.words import (
    counted,
    cut,
    duration,
    number,
    percentile,
    safe,
    share,
    size,
    speed,
    table,
    width,
    wrap,
)
from rspd.snapshot import CONNECT_BOUNDS, Distribution
from tests.support import PATIENCE


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.00003, "0.03 ms"),
        (0.0004, "0.4 ms"),
        (0.001, "1 ms"),
        (0.0042, "4.2 ms"),
        (0.42, "420 ms"),
        (0.9994, "999 ms"),
        (0.9996, "1 s"),
        (3.24, "3.2 s"),
        (9.96, "10 s"),
        (59.4, "59 s"),
        (59.7, "1 m"),
        (250, "4 m 10 s"),
        (3599.6, "1 h"),
        (3660, "1 h 1 m"),
        (86399, "23 h 59 m"),
        (86400, "1 d"),
        (3 * 86400 + 4 * 3600 + 59 * 60, "3 d 4 h"),
        (4000 * 86400, "4,000 d"),
        (inf, "-"),
        (nan, "-"),
    ],
)
def test_a_duration_is_said_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (999.7, "1 kB"),
        (1000, "1 kB"),
        (1234, "1.2 kB"),
        (12_345_678, "12 MB"),
        (999_600, "1 MB"),
        (1.25e9, "1.2 GB"),
        (5e21, "5,000 EB"),
    ],
)
def test_bytes_are_said_in_the_unit_that_leaves_the_fewest_digits(count: float, text: str) -> None:
    assert size(count) == text
    assert speed(count) == f"{text}/s"


def test_numbers_shares_and_counts_are_short() -> None:
    assert [number(value) for value in (0, 0.04, 0.3, 9, 12.4, 4000, inf)] == [
        "0",
        "0.04",
        "0.3",
        "9",
        "12",
        "4,000",
        "-",
    ]
    assert [share(1, 2), share(4, 1000), share(0, 5), share(0, 0)] == ["50 %", "0.4 %", "0 %", "-"]
    assert [counted(1, "reload"), counted(4000, "reload"), counted(2, "proxy", "proxies")] == [
        "1 reload",
        "4,000 reloads",
        "2 proxies",
    ]


def test_a_percentile_is_interpolated_within_its_bucket() -> None:
    even = Distribution((10, 10, 0, 0), 0.0)
    bounds = (1.0, 3.0, 10.0)
    assert percentile(even, bounds, 0.25) == 0.5
    assert percentile(even, bounds, 0.5) == 1.0
    assert percentile(even, bounds, 0.75) == 2.0
    assert percentile(even, bounds, 1.0) == 3.0
    assert percentile(Distribution((0, 4, 0, 0)), bounds, 0.0) == 1.0


def test_a_percentile_above_the_last_bound_is_that_bound() -> None:
    assert percentile(Distribution((1, 0, 99)), (1.0, 2.0), 0.99) == 2.0


def test_there_is_no_percentile_of_nothing_or_of_other_buckets() -> None:
    assert percentile(Distribution(), CONNECT_BOUNDS, 0.5) is None
    assert percentile(Distribution((0, 0)), (1.0,), 0.5) is None
    assert percentile(Distribution((1, 2, 3)), (1.0,), 0.5) is None


def test_what_a_terminal_would_obey_is_escaped() -> None:
    assert safe("caf\xe9 \u4e16 a:1") == "caf\xe9 \u4e16 a:1"
    assert safe("a\x1b[2J\nb\x9b\u202e\ud800") == "a\\x1b[2J\\nb\\x9b\\u202e\\ud800"


def test_what_is_too_long_is_cut_by_columns_and_not_by_characters() -> None:
    assert cut("abcdef", 6) == "abcdef"
    assert cut("abcdefg", 6) == "abcde…"
    assert cut("abcdefg", None) == "abcdefg"
    assert cut("世界世界", 5) == "世界…"
    assert width("世界e\u0301") == 5
    assert cut("ab", 0) == ""


def test_a_sentence_is_wrapped_between_words_and_cut_after_its_rows() -> None:
    text = "one two three four five six seven"
    assert wrap(text, None, rows=1) == [text]
    assert wrap(text, 13) == ["one two three", "  four five", "  six seven"]
    assert wrap(text, 13, rows=2) == ["one two three", "  four five …"]
    assert wrap("a-word-that-is-too-long and more", 8) == ["a-word-…", "  and", "  more"]


def test_a_table_is_aligned_and_cuts_names_where_there_are_too_few_columns() -> None:
    rows = [("NAME", "OPEN", "WHY"), ("a-name-of-some-length", "1,000", "no reason"), ("b", "5", "")]
    assert table(rows, right=[1], indent="  ") == [
        "  NAME                    OPEN  WHY",
        "  a-name-of-some-length  1,000  no reason",
        "  b                          5",
    ]
    assert table(rows, right=[1], columns=34, names=[0])[1:] == [
        "a-name-of-some-le… 1,000 no reason",
        "b                      5",
    ]
    assert table(rows, columns=25, names=[0])[1] == "a-name-of-some… 1,000 no…"
    assert table(rows, columns=36, names=[0], last=4)[1] == "a-name-of-some-length  1,000  no re…"
    assert table([]) == []


CODE = (
    "from rspd.commands.words import terminal_columns; from rspd.parser import show; "
    "show(f'{terminal_columns()} \\u2026')"
)


def test_a_terminal_says_how_wide_it_is() -> None:
    ours, theirs = pty.openpty()
    try:
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 70, 0, 0))
        subprocess.run([sys.executable, "-c", CODE], stdout=theirs, timeout=PATIENCE, check=True)
        with open(ours, "rb", buffering=0, closefd=False) as terminal:
            assert terminal.readline().decode() == "70 …\r\n"
    finally:
        os.close(ours)
        os.close(theirs)


def test_an_encoding_without_the_character_is_no_error() -> None:
    env = {**os.environ, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, timeout=PATIENCE, check=True, env=env)
    assert done.stdout == b"None \\u2026\n"
