"""What is said of a file that is no YAML: the line at fault, and what belongs there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from rspd.config.keys import load_config
from rspd.errors import ConfigError

Fault = Callable[[str | bytes], str]


@pytest.fixture
def fault(tmp_path: Path) -> Fault:
    """The one error of a file with this content, as LINE: what is wrong."""

    def fault(content: str | bytes) -> str:
        file = tmp_path / "rspd.yaml"
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
        with pytest.raises(ConfigError) as caught:
            load_config(str(file), {})
        (error,) = caught.value.errors
        line, told, what = error.removeprefix(f"{file}:").partition(": not valid YAML: ")
        assert told, error
        return f"{line}: {what}"

    return fault


COMMA = "a comma or {} is missing here, or in the line before"
PAIR = "expected KEY: VALUE, found"
PAIR_OR_ITEM = "expected KEY: VALUE, or - ITEM as above, found"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("listen: 80\nbackend 127.0.0.1:8000\nbacklog: 4\n", f"2: {PAIR} 'backend 127.0.0.1:8000'"),
        ("listen: 80\nbackend\n", f"2: {PAIR} 'backend'"),
        ("listen: 80\nbackend a:1", f"2: {PAIR} 'backend a:1'"),
        ("listen: 80\nbackend = a:1\n", f"2: {PAIR} 'backend = a:1'; a colon belongs in place of ="),
        ("listen 80\nbackend: a:1\n", f"1: {PAIR} 'listen 80'"),
        ("listen 80\n\n# why\nbackend: a:1\n", f"1: {PAIR} 'listen 80'"),
        ("listen: 80\nfoo\nbar\nbackend: a:1\n", f"2: {PAIR} 'foo'"),
        ("listen:80\nbackend: a:1\n", f"1: {PAIR} 'listen:80'; a space belongs after the colon"),
        ("listen: 80\nbackend:a:1\nbacklog: 5\n", f"2: {PAIR} 'backend:a:1'; a space belongs after the colon"),
        ("listen: 80\n- backend: a:1\n", f"2: {PAIR} '- backend: a:1'"),
        ("backends:\n- a:1\nb:1\nlisten: 80\n", f"3: {PAIR_OR_ITEM} 'b:1'"),
        ("backends:\n  - a:1\n  b:1\nlisten: 80\n", f"3: {PAIR_OR_ITEM} 'b:1'"),
        ("listen: 80\r\nbackend\r\nbacklog: 1\r\n", f"2: {PAIR} 'backend'"),
        ("listen: 80\nbackend\nbacklog: 1\n".encode("utf-16"), f"2: {PAIR} 'backend'"),
        (b"\xfe\xff" + "listen: 80\nbackend\nbacklog: 1\n".encode("utf-16-be"), f"2: {PAIR} 'backend'"),
        ("listen 80\nbackend: a:1\n".encode("utf-8-sig"), f"1: {PAIR} 'listen 80'"),
        ("listen: 80\u2028# why\x85backend\nbacklog: 1\n", f"3: {PAIR} 'backend'"),
        (f"listen: 80\n{'x' * 200}\nbacklog: 1\n", f"2: {PAIR} '{'x' * 79}…'"),
        (
            "backends:\n  - address: a:1\n    weight:2\nlisten: 80\n",
            f"3: {PAIR} 'weight:2'; a space belongs after the colon",
        ),
    ],
)
def test_a_line_without_a_colon_is_the_line_at_fault(fault: Fault, content: str | bytes, message: str) -> None:
    assert fault(content) == message


@pytest.mark.parametrize(
    ("content", "line", "column", "other", "beside"),
    [
        ("  listen: 80\nbackend: a:1\n", 1, 3, 2, 1),
        ("# why\n\n  listen: 80\n# why not\nbackend: a:1\n", 3, 3, 5, 1),
        ("health:\n    http: /\nbackends:\n  - a:1\n   listen: 80\n", 5, 4, 3, 1),
        ("proxies:\n  web:\n      listen: 80\n     # x: y\n    backend: a:1\n", 5, 5, 3, 7),
        ("health:\n# why\n    # why not\n    http: /\n  rise: 2\n", 5, 3, 4, 5),
        ("health:\n    interval: 5s\n  timeout: 2s\nlisten: 80\n", 3, 3, 2, 5),
        ("backends:\n  - a:1\n - b:2\nlisten: 80\n", 3, 2, 2, 3),
        ("backends:\n - a:1\n  b: 2\nlisten: 80\n", 3, 3, 1, 1),
        ("backends:\n  - a:1\n  - b:2\n listen: 80\n", 4, 2, 1, 1),
        ("backends:\n    - address: a:1\n      weight: 2\n  - address: b:2\n", 4, 3, 2, 5),
        ("proxies:\n  web:\n    health:\n      http: /\n   mail:\n    listen: 25\n", 5, 4, 2, 3),
        ("proxies:\n  web:\n    health:\n      http: /\n     listen: 25\n", 5, 6, 4, 7),
        ("backends:\n  - address: a:1\n  weight: 2\n", 3, 3, 2, 5),
        ("proxies:\n  web:\n    listen: 80\n   mail:\n    listen: 81\n", 4, 4, 2, 3),
    ],
)
def test_a_wrong_indentation_is_told_with_the_line_at_fault_and_the_one_beside_it(
    fault: Fault, content: str, line: int, column: int, other: int, beside: int
) -> None:
    where = f"this line begins in column {column}, line {other} in column {beside}"
    assert fault(content) == f"{line}: wrong indentation: {where}; what belongs together begins in the same column"


@pytest.mark.parametrize(
    ("content", "line", "column"),
    [
        ("\tlisten: 80\n", 1, 1),
        ("health:\n\tinterval: 5s\n", 2, 1),
        ("listen:\n \t- 80\n", 2, 2),
        ("listen: 80\n\tbackend: a:1\n", 2, 1),
    ],
)
def test_a_tab_is_told_to_be_none_of_yamls_indentation(fault: Fault, content: str, line: int, column: int) -> None:
    assert fault(content) == f"{line}: found a tab in column {column}, expected spaces; YAML indents by spaces"


@pytest.mark.parametrize(("content", "column"), [("listen:\t80\n", 8), ("listen: 80\t# why\n", 11)])
def test_a_tab_that_does_not_indent_is_told_with_its_column(fault: Fault, content: str, column: int) -> None:
    assert fault(content) == f"1: found a tab in column {column}, expected spaces"


@pytest.mark.parametrize(
    ("content", "line", "column", "other", "beside"),
    [
        ("listen: 80\n  backend: a:1\n", 2, 3, 1, 1),
        ("health: on\n# why\n  http: /\n", 3, 3, 1, 1),
        ("health:\n  interval: 5s\n    timeout: 2s\nlisten: 80\n", 3, 5, 2, 3),
        ("backends:\n  - address: a:1\n     weight: 2\n", 3, 6, 2, 5),
    ],
)
def test_below_a_key_that_has_a_value_nothing_is_indented(
    fault: Fault, content: str, line: int, column: int, other: int, beside: int
) -> None:
    where = f"this line begins in column {column}, line {other} in column {beside}"
    assert fault(content) == f"{line}: wrong indentation: {where}; below a key that has a value, nothing is indented"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a:80\n    weight: 2", "'- a:80'; with further keys, it is - address: a:80"),
        ("- address a:80\n    weight: 2", "'- address a:80'"),
        ("- address:a:80\n    weight: 2", "'- address:a:80'; a space belongs after the colon"),
    ],
)
def test_an_item_without_keys_cannot_have_further_ones(fault: Fault, content: str, message: str) -> None:
    assert fault(f"listen: 80\nbackends:\n  {content}\n") == f"3: expected - KEY: VALUE, found {message}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "listen: 127.0.0.1: 80\n",
            (
                "1: expected one KEY: VALUE, found 'listen: 127.0.0.1: 80'; "
                "in a value, a colon has no space after it, unless the value is in quotes"
            ),
        ),
        ("listen: [80, 81\nbackend: a:1\n", "1: the list that begins here has no ]"),
        ("backend: a:1\nlisten: [80, 81\n", "2: the list that begins here has no ]"),
        ("health: {http: /\nbackend: a:1\n", "1: the mapping that begins here has no }"),
        ("listen: 80\nhealth: {http: /\n", "2: the mapping that begins here has no }"),
        ("health: {http: /,\n  interval: 5s\n  timeout: 2s}\n", f"3: {COMMA.format('}')}"),
        ("{listen: 80,\n backend: 'a:1'\n backlog: 2}", f"3: {COMMA.format('}')}"),
        ("{listen: 80,\nbackend: 'a:1'\nbacklog: 2}", f"3: {COMMA.format('}')}"),
        ("listen: {80: a, 81 b: c: d}\n", f"1: {COMMA.format('}')}"),
        ("backends: [{address: a:1} {address: b:1}]\n", f"1: {COMMA.format(']')}"),
        ("listen: 80\nbackend: a:1\n]", "3: found ], and nothing that it closes"),
        ("listen: [80]]\nbackend: a:1\n", "1: found ], and nothing that it closes"),
        ("listen: [80], [81]\nbackend: a:1\n", "1: found text after a closed quote or bracket"),
        ('listen: "80\nbackend: "a:1"\n', "1: the quote that begins here has no end"),
        ("[rspd]\nlisten = 80\n", f"2: {PAIR} 'listen = 80'; a colon belongs in place of ="),
        ("listen: *\n", "1: a value that starts with * or & needs quotes"),
        ("listen: *.8080\n", "1: a value that starts with * or & needs quotes"),
        ("listen: *port\n", "1: found undefined alias 'port'; a value that starts with * or & needs quotes"),
        ("listen: `80`\n", "1: a value that starts with ` needs quotes"),
        ("listen: %80\n", "1: a value that starts with % needs quotes"),
        ("listen: 80\nhealth: {\n\n", "2: the list or mapping in brackets has no end"),
        ("listen: '80\nbackend: a:1", "1: the quote that begins here has no end"),
        ('backend: a:1\nlisten: "80\n', "2: the quote that begins here has no end"),
        ("listen: '80' 81\nbackend: a:1", "1: found text after a closed quote or bracket"),
        ("listen: [80] 81\nbackend: a:1", "1: found text after a closed quote or bracket"),
        ("listen: *:8090\n", "1: '*:8090' is no address; a port alone is every address: 8090"),
        ("listen: [80, *:http]\n", "1: '*:http' is no address; a port alone is every address: http"),
        ("backends: - a:1\n  - b:1\n", "1: a list in lines of its own begins in the line after its key"),
    ],
)
def test_what_is_not_closed_or_means_something_else_is_told(fault: Fault, content: str, message: str) -> None:
    assert fault(content) == message


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("listen: !<%ff> 80\n", "1: 'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        ("%listen: 80\n", "1: expected alphabetic or numeric character, but found ':'"),
        ("listen: [80,, 81]\n", "1: expected the node content, but found ','"),
        ("listen: >x\n  80\n", "1: expected chomping or indentation indicators, but found 'x'"),
    ],
)
def test_what_is_wrong_otherwise_is_told_in_the_readers_words(fault: Fault, content: str, message: str) -> None:
    assert fault(content) == message


@pytest.mark.parametrize(
    ("content", "line", "what"),
    [
        (b"listen: 80\rbackend: a:1\rbacklog: \xff\r", 3, "not UTF-8 text, "),
        ("listen: 80\nbackend: a:1\nbacklog: \x1b\n".encode("utf-16"), 3, "unacceptable character #x001b"),
    ],
)
def test_bytes_that_are_no_text_are_told_with_their_line(fault: Fault, content: bytes, line: int, what: str) -> None:
    assert fault(content).startswith(f"{line}: {what}")
