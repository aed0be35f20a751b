"""The house: who may import whom, how many files a folder has, and how long they are."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "rspd"

# Each folder of rspd/, and each file beside them, with those that it may import.
MAY_IMPORT = {
    "engine": "",
    "protocols": "",
    "log": "",
    "errors": "",
    "net": "engine log",
    "settings": "net",
    "snapshot": "",
    "histogram": "snapshot",
    "balancing": "snapshot histogram engine net settings log",
    "serving": "routing balancing protocols snapshot histogram engine net settings log",
    "routing": "balancing protocols engine net settings log",
    "observing": "admin serving routing balancing snapshot histogram engine net log",
    "admin": "snapshot histogram protocols net engine log",
    "parser": "config errors",
    "commands": "parser admin snapshot config engine net settings errors log",
    "explaining": "config settings net",
    "config": "settings net errors log",
    "host": "errors log",
    "listening": "admin host settings net engine errors log",
    "running": "observing listening serving routing balancing explaining config host settings histogram net engine "
    "errors log",
    "cli": "parser running explaining config host settings errors log",
    "__main__": "cli commands errors log",
    "__init__": "",
}

# Beside __init__.py.
FILES_MAX = 8

# About so many lines are where a file begins to be two.
LINES_MAX = 320

FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}
FOLDERS = sorted({path.parent for path in FILES.values()})


def home(module: str) -> str:
    """The folder of a module, or the file beside the folders. Names begin below rspd."""
    return module.partition(".")[0]


def imported(code: str) -> set[str]:
    """The modules of rspd that code imports anywhere, inside functions too. A folder counts as its `__init__`."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"expected no relative import, found {ast.unparse(node)}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            package, *parts = name.split(".")
            if package != "rspd":
                continue
            # The last part may be a class or a function.
            while parts and ".".join(parts) not in FILES and ".".join([*parts, "__init__"]) not in FILES:
                parts.pop()
            module = ".".join(parts)
            found.add(module if module in FILES else f"{module}.__init__".lstrip("."))
    return found


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_its_folder_may_import(module: str) -> None:
    code = FILES[module].read_text()
    assert "import_module" not in code
    assert "__import__" not in code
    assert home(module) in MAY_IMPORT, f"say in MAY_IMPORT what {home(module)} may import"
    allowed = {home(module), *MAY_IMPORT[home(module)].split()}
    found = {name for name in imported(code) if home(name) not in allowed}
    # The version is in the package itself.
    assert found - {"__init__"} == set()
    assert "__init__" not in found or module == "cli", "expected the module that is used, found rspd itself"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_the_map_of_a_folder_is_complete_and_imports_point_down_it(folder: Path) -> None:
    order = re.findall(r"^(\w+) {2,}", (folder / "__init__.py").read_text(), re.MULTILINE)
    prefix = "".join(f"{part}." for part in folder.relative_to(PACKAGE).parts)
    modules = [module.removeprefix(prefix) for module in FILES if module.startswith(prefix)]
    assert set(order) == {home(module) for module in modules} - {"__init__", "__main__"}
    for module in (module for module in modules if home(module) in order):
        names = imported(FILES[prefix + module].read_text())
        used = {home(name.removeprefix(prefix)) for name in names if name.startswith(prefix)}
        above = order[: order.index(home(module))]
        assert not used & set(above), f"{module} imports from above it"


def test_imports_are_found_however_they_are_written() -> None:
    code = """
import rspd.net.address
from rspd.net import ways, connect as dial
from rspd import log, __version__
def function():
    if True:
        import rspd.cli
        from rspd.engine.loop import Loop
        from rspd import config
        from rspd.host import *
import rspd.balancing, rspd
"""
    modules = {"net.address", "net.ways", "net.connect", "log", "cli", "engine.loop"}
    assert imported(code) == modules | {"__init__", "config.__init__", "host.__init__", "balancing.__init__"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_folder_has_few_files_and_none_below_it(folder: Path) -> None:
    assert folder == PACKAGE or folder.parent == PACKAGE
    assert len(list(folder.glob("*.py"))) - 1 <= FILES_MAX


def test_a_file_is_short() -> None:
    lines = {module: path.read_text().count("\n") for module, path in FILES.items()}
    assert {module: count for module, count in lines.items() if count > LINES_MAX} == {}


@pytest.mark.parametrize("module", FILES)
def test_the_annotations_of_named_tuples_are_no_text(module: str) -> None:
    code = FILES[module].read_text()
    future = "from __future__ import annotations" in code
    assert not (future and "(NamedTuple)" in code), "typing compiles text, and each start pays for it"


def test_each_folder_of_tests_is_among_those_that_pytest_reads() -> None:
    tests = PACKAGE.parent / "tests"
    read = (PACKAGE.parent / "pyproject.toml").read_text().partition("testpaths = [")[2].partition("]")[0]
    folders = {f"tests/{path.parent.name}" for path in tests.glob("*/__init__.py")}
    own_suites = {"tests/peers", "tests/system", "tests/handover"}
    assert {line.strip('",') for line in read.split()} - {"tests/test_*.py"} == folders - own_suites
