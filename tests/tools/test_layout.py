"""The tests mirror the rooms, share helpers from tests/support alone, and none is left for a person to run."""

import ast
from pathlib import Path

import pytest

from tests.support.order import LONG
from tools.architecture import ROOT

TESTS = ROOT / "tests"
FILES = sorted(TESTS.rglob("*.py"))
PROGRAMS = ("compose", "e2e")  # `make compose-test` and `make e2e`: their parts lie beside them
CROSSING = ("compose", "deploy", "e2e", "packaging", "support", "tools")  # about several rooms


@pytest.mark.parametrize("file", FILES, ids=lambda it: str(it.relative_to(TESTS)))
def test_no_test_imports_another(file: Path) -> None:
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests."):
            parts = str(node.module).split(".")
            assert parts[1] == "support" or parts[1] in PROGRAMS, node.module
            assert not parts[-1].startswith("test_"), node.module


def test_every_file_is_collected_or_shared() -> None:
    for file in FILES:
        shared = file.parent.name == "support" or file.parent.name in PROGRAMS
        assert file.name.startswith("test_") or file.name == "conftest.py" or shared, file


def test_folders_are_named_like_rooms() -> None:
    rooms = {it.parent.name for it in ROOT.glob("*/__init__.py")}
    for folder in (it for it in TESTS.iterdir() if it.is_dir() and not it.name.startswith(("_", "."))):
        assert folder.name in rooms | set(CROSSING), folder
        for file in folder.rglob("test_*.py"):
            assert not file.name.startswith(f"test_{folder.name}_"), f"{file}: the folder says that already"


def test_the_long_files_are_there() -> None:
    assert [file for file in LONG if not (TESTS / file).is_file()] == []
