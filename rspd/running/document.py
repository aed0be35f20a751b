"""The document that says what is handed over, and its form: a line with its lengths, JSON, and the bytes.

JSON cannot hold bytes. So they stand behind it, and in their place is where they are. Each owner says its own part of
the document, and takes it in the next process. A reader takes a default for what is missing, and ignores what it does
not know. VERSION changes only if a reader of the old one would be wrong.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rspd.engine.side import Handed

VERSION = 1
READABLE = {1}


class DocumentError(Exception):
    """The document of the process before cannot be read; the text says why."""


def write(document: Mapping[str, Any]) -> list[bytes | memoryview]:
    """The document, in parts."""
    held: list[bytes | memoryview] = []
    size = 0

    def set_aside(value: object) -> dict[str, list[int]]:
        nonlocal size
        assert isinstance(value, (bytes, memoryview)), f"no plain value: {value!r}"
        held.append(value)
        size += len(value)
        return {"bytes": [size - len(value), size]}

    text = json.dumps({"version": VERSION, **document}, default=set_aside, separators=(",", ":")).encode()
    return [f"rspd {len(text)} {size}\n".encode(), text, *held]


def read(content: bytes) -> Handed:
    """The document that `write` made. Raises DocumentError if it is damaged, or of a version that is not READABLE."""
    line, _, rest = content.partition(b"\n")
    try:
        name, *sizes = line.split()
        size, held_size = map(int, sizes)
        if name != b"rspd" or len(rest) != size + held_size:
            raise DocumentError(f"expected {size + held_size} bytes after its first line, found {len(rest)}")
        held = memoryview(rest)[size:]

        def put_back(value: dict[str, Any]) -> Any:
            if value.keys() == {"bytes"}:
                begin, end = value["bytes"]
                return bytes(held[begin:end])
            return value

        text = rest[:size]
        document = json.loads(text, object_hook=put_back if b'{"bytes":' in text else None)
        version = document.get("version")
    except (ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise DocumentError(f"expected the state of rspd's connections, found {content[:40]!r}: {error}") from None
    if version not in READABLE:
        raise DocumentError(f"expected version {VERSION} of it, found {version!r}")
    return document  # type: ignore[no-any-return]
