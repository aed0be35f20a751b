"""The house: who may import whom, how many files a folder has, and how long they are."""

from __future__ import annotations

import ast
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
    "balancing": "engine net settings log",
    "serving": "balancing protocols engine net settings log",
    "config": "settings net errors log",
    "host": "errors log",
    "running": "serving balancing config host settings net protocols engine errors log",
    "cli": "running config host settings errors log",
    "__main__": "cli",
    "__init__": "",
}

# What is still to be taken apart: a module, and the modules that it imports though it may not.
EXCEPTIONS = {
    "balancing.members": {"protocols.proxy_protocol"},
}

# Beside __init__.py.
FILES_MAX = 8

# About so many lines are where a file begins to be two.
LINES_MAX = 310

# Files that are longer, and are still to be taken apart.
LONG = {"balancing.members"}

FILES = {".".join(path.relative_to(PACKAGE).with_suffix("").parts): path for path in sorted(PACKAGE.rglob("*.py"))}


def home(module: str) -> str:
    """The folder of a module, or the file beside the folders. Names begin below rspd."""
    return module.partition(".")[0]


def imported(code: str) -> set[str]:
    """The modules of rspd that code imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(code)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"expected no relative import, found {ast.unparse(node)}"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name == "rspd" or name.startswith("rspd."):
                parts = name.split(".")[1:]
                # The last part may be something in the module.
                found |= {module for module in (".".join(parts), ".".join(parts[:-1])) if module in FILES}
    return found


@pytest.mark.parametrize("module", FILES)
def test_a_module_imports_only_what_its_folder_may_import(module: str) -> None:
    allowed = {home(module), *MAY_IMPORT[home(module)].split()}
    found = {name for name in imported(FILES[module].read_text()) if home(name) not in allowed}
    assert found == EXCEPTIONS.get(module, set())


def test_imports_are_found_however_they_are_written() -> None:
    code = """
import rspd.net.address
from rspd.net import ways, connect as dial
from rspd import log, __version__
def function():
    if True:
        import rspd.cli
        from rspd.engine.loop import Loop
"""
    assert imported(code) == {"net.address", "net.ways", "net.connect", "log", "cli", "engine.loop"}


@pytest.mark.parametrize("folder", [path for path in PACKAGE.iterdir() if (path / "__init__.py").exists()])
def test_a_folder_has_few_files(folder: Path) -> None:
    assert len(list(folder.glob("*.py"))) - 1 <= FILES_MAX


def test_a_file_is_short() -> None:
    long = {module for module, path in FILES.items() if path.read_text().count("\n") > LINES_MAX}
    assert long == LONG


def test_each_folder_of_tests_is_among_those_that_pytest_reads() -> None:
    tests = PACKAGE.parent / "tests"
    read = (PACKAGE.parent / "pyproject.toml").read_text().partition("testpaths = [")[2].partition("]")[0]
    folders = {f"tests/{path.parent.name}" for path in tests.glob("*/__init__.py")}
    # tests/system needs root and machines.
    assert {line.strip().strip('",') for line in read.split()} - {"tests/test_*.py"} == folders - {"tests/system"}
