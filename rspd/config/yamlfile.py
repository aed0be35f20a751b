"""A YAML file as keys and values with their lines, uninterpreted, to any depth."""

from typing import Any, NamedTuple

from rspd.config.yamlfaults import advise_pair, describe_fault
from rspd.errors import ConfigError


class Value:
    """A value of the file: a scalar, a list or a mapping. One of `text`, `items` and `entries` is not None.

    By an alias, the same value may stand in many places, even within itself.

    line: the line where it begins.
    text: a scalar as it is written.
    items: the values in a list.
    dashed: whether it is a list, with a dash before each item.
    entries: the entries of a mapping, in the file's order.
    """

    def __init__(self, line: int) -> None:
        self.line = line
        self.text: str | None = None
        self.items: list[Value] | None = None
        self.dashed = False
        self.entries: list[Entry] | None = None

    @property
    def kind(self) -> str:
        """What the value is, in words; a scalar is quoted."""
        if self.text is not None:
            return repr(self.text)
        return "a list" if self.entries is None else "a mapping"


class Entry(NamedTuple):
    """A key, its line, and its value."""

    line: int
    key: str
    value: Value


def read_entries(path: str, content: bytes | None = None) -> list[Entry]:
    """The keys of a YAML file, in its order. Raises ConfigError for another kind of file, OSError if unreadable.

    content: what to read in place of the file.
    """
    if content is None:
        with open(path, "rb") as file:
            content = file.read()
    root = _read(path, content)
    if root is None:
        return []
    if root.entries is None:
        advice = "; leave out the dashes" if root.dashed else advise_pair(root.text or "")
        raise ConfigError([f"{path}:{root.line}: expected lines of KEY: VALUE, found {root.kind}{advice}"])
    return root.entries


def _read(path: str, content: bytes) -> Value | None:
    """The value that a YAML file is; None for an empty one."""
    try:
        import yaml  # slow to import, and not needed where there is no file
    except ImportError as error:  # packages are being replaced
        raise ConfigError([f"{path}: PyYAML is needed to read it: {error}; install python3-yaml"]) from None
    try:
        loader = yaml.BaseLoader(content)
        node = loader.get_single_node()
        if node is None or (isinstance(node, yaml.ScalarNode) and not node.value and not node.style):
            return None
        return _value_of(node, {})
    except yaml.YAMLError as error:
        line, fault = describe_fault(content, error)
        raise ConfigError([f"{path}:{line}: not valid YAML: {fault}"]) from None
    except (ValueError, OverflowError) as error:  # such as \U beyond Unicode, or a %YAML version of thousands of digits
        raise ConfigError([f"{path}:{loader.line + 1}: not valid YAML: {error}"]) from None
    except RecursionError:
        raise ConfigError([f"{path}: not valid YAML: nested too deeply"]) from None


def _value_of(node: Any, known: dict[Any, Value]) -> Value:
    """The value that a node of PyYAML is. known: the values of other nodes: with aliases, a node may come again."""
    if node in known:
        return known[node]
    value = known[node] = Value(node.start_mark.line + 1)
    if node.id == "scalar":
        value.text = str(node.value)
    elif node.id == "sequence":
        value.dashed = not node.flow_style
        value.items = [_value_of(item, known) for item in node.value]
    else:
        value.entries = entries = []
        for key_node, entry in node.value:
            key = _value_of(key_node, known)
            entries.append(Entry(key.line, _name(key), _value_of(entry, known)))
    return value


def _name(key: Value) -> str:
    name = f"({key.kind})" if key.text is None else key.text
    return name if name and name.isprintable() else ascii(name)
