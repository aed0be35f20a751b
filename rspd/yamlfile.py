"""A YAML file as keys and values with their lines, uninterpreted."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import yaml


class ConfigError(Exception):
    """What is wrong with a configuration: `errors` has a line for each, with place, key, expected and found."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("\n".join(errors))
        self.errors = errors


class Item(NamedTuple):
    """A scalar as it is written, and the line it stands on."""

    line: int
    text: str


class Entry(NamedTuple):
    """A key of the file, its line, and its value: the items of it, or what it is in place of one or several."""

    line: int
    key: str
    value: list[Item] | str
    is_list: bool = False


def read_entries(path: str) -> list[Entry]:
    """The keys of a YAML file, in its order. Raises ConfigError for another kind of file, OSError if unreadable."""
    with open(path, "rb") as file:
        text = file.read()
    loader = None
    try:
        loader = yaml.BaseLoader(text)
        root = loader.get_single_node()
    except yaml.YAMLError as error:
        raise ConfigError([_describe_yaml_error(path, text, error)]) from None
    except (ValueError, OverflowError) as error:  # \U beyond Unicode, a %YAML version of thousands of digits
        raise ConfigError([f"{path}:{loader.line + 1 if loader else 1}: not valid YAML: {error}"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: not valid YAML: nested too deeply"]) from None
    if root is None or (isinstance(root, yaml.ScalarNode) and not root.value and not root.style):
        return []
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError([f"{path}:{_line(root)}: expected lines of KEY: VALUE, found {_kind(root)}"])
    return [_entry(key, value) for key, value in root.value]


def _entry(key: yaml.Node, value: yaml.Node) -> Entry:
    name = key.value if isinstance(key, yaml.ScalarNode) else f"({_kind(key)})"
    if not name or not name.isprintable():
        name = ascii(name)
    if isinstance(value, yaml.ScalarNode):
        return Entry(_line(key), name, [Item(_line(value), value.value)])
    if isinstance(value, yaml.SequenceNode):
        wrong = [item for item in value.value if not isinstance(item, yaml.ScalarNode)]
        if wrong:
            return Entry(_line(wrong[0]), name, _kind(wrong[0]), True)
        return Entry(_line(key), name, [Item(_line(item), item.value) for item in value.value], True)
    return Entry(_line(key), name, _kind(value))


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value)
    return "a mapping" if isinstance(node, yaml.MappingNode) else "a list"


def _describe_yaml_error(path: str, text: bytes, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        # Its position counts bytes where they could not be decoded, characters where one is not allowed.
        undecodable = error.encoding != "unicode"
        before = text[: error.position].decode(errors="replace") if undecodable else text.decode(errors="replace")
        line = before[: error.position].count("\n") + 1
        reason = f"not {error.encoding.upper()} text, " if undecodable else ""
        return f"{path}:{line}: not valid YAML: {reason}{str(error).splitlines()[0]}"
    assert isinstance(error, yaml.MarkedYAMLError)
    assert error.problem_mark
    line = error.problem_mark.line
    problem = error.problem
    if isinstance(error, yaml.composer.ComposerError) and error.context:
        problem = f"{error.context}, {problem}"
    if re.search(r"[:-]\s+[\[@]", "".join(text.decode(errors="replace").splitlines()[line : line + 1])):
        # The two forms of an address that mean something else to YAML.
        problem = f"{problem}; an address that starts with [ or @ needs quotes"
    return f"{path}:{line + 1}: not valid YAML: {problem}"
