"""A YAML file as keys and values with their lines, uninterpreted, to any depth."""

from __future__ import annotations

from typing import NamedTuple

import yaml

from rspd.config.yamlfaults import advise_pair, describe_fault
from rspd.errors import ConfigError


class Value(NamedTuple):
    """A value of the file: a scalar, a list or a mapping. One of `text`, `items` and `entries` is not None."""

    node: yaml.Node  # read only as far as it is asked for: with aliases, a file can mean more than fits in memory

    @property
    def line(self) -> int:
        """The line where the value begins."""
        return int(self.node.start_mark.line) + 1

    @property
    def text(self) -> str | None:
        """A scalar as it is written."""
        return str(self.node.value) if isinstance(self.node, yaml.ScalarNode) else None

    @property
    def items(self) -> list[Value] | None:
        """The values in a list."""
        return [Value(item) for item in self.node.value] if isinstance(self.node, yaml.SequenceNode) else None

    @property
    def dashed(self) -> bool:
        """Whether it is a list, with a dash before each item."""
        return isinstance(self.node, yaml.SequenceNode) and not self.node.flow_style

    @property
    def entries(self) -> list[Entry] | None:
        """The entries of a mapping, in the file's order."""
        if not isinstance(self.node, yaml.MappingNode):
            return None
        return [Entry(Value(key).line, _name(Value(key)), Value(value)) for key, value in self.node.value]

    @property
    def kind(self) -> str:
        """What the value is, in words; a scalar is quoted."""
        if self.text is not None:
            return repr(self.text)
        return "a mapping" if isinstance(self.node, yaml.MappingNode) else "a list"


class Entry(NamedTuple):
    """A key, its line, and its value."""

    line: int
    key: str
    value: Value


def read_entries(path: str) -> list[Entry]:
    """The keys of a YAML file, in its order. Raises ConfigError for another kind of file, OSError if unreadable."""
    with open(path, "rb") as file:
        text = file.read()
    try:
        loader = yaml.BaseLoader(text)
        node = loader.get_single_node()
    except yaml.YAMLError as error:
        line, fault = describe_fault(text, error)
        raise ConfigError([f"{path}:{line}: not valid YAML: {fault}"]) from None
    except (ValueError, OverflowError) as error:  # such as \U beyond Unicode, or a %YAML version of thousands of digits
        raise ConfigError([f"{path}:{loader.line + 1}: not valid YAML: {error}"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: not valid YAML: nested too deeply"]) from None
    if node is None or (isinstance(node, yaml.ScalarNode) and not node.value and not node.style):
        return []
    root = Value(node)
    entries = root.entries
    if entries is None:
        advice = "; leave out the dashes" if root.dashed else advise_pair(root.text or "")
        raise ConfigError([f"{path}:{root.line}: expected lines of KEY: VALUE, found {root.kind}{advice}"])
    return entries


def _name(key: Value) -> str:
    name = f"({key.kind})" if key.text is None else key.text
    return name if name and name.isprintable() else ascii(name)
