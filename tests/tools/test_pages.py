"""docs/ARCHITECTURE.md and docs/decisions: what they name exists, and what they should name they name."""

import ast
import re
from pathlib import Path

import pytest

from tools.architecture import ROOT, arrows

PAGE = (ROOT / "docs" / "ARCHITECTURE.md").read_text()
DECISIONS = sorted((ROOT / "docs" / "decisions").glob("*.md"))
TABLES = PAGE[PAGE.index("## Threads and locks") :]
PLACES = ("", "service/", "fullrank/monitor/", "fullrank/")
MAKES = {"Lock", "RLock", "Condition", "Semaphore", "Thread", "Timer", "ThreadPoolExecutor", "ProcessPoolExecutor"}


def exists(name: str) -> bool:
    return any((ROOT / place / name).exists() for place in PLACES)


def test_every_file_it_names_exists() -> None:
    named = re.findall(r"`([\w./-]+(?:\.py|\.md|/))`", PAGE)
    assert len(named) > 40
    assert [name for name in named if not exists(name)] == []


def test_every_room_has_a_line() -> None:
    rooms, _ = arrows()
    assert {room for room in rooms if f"| `{room}/` |" not in PAGE} == set()


def makers() -> set[str]:
    """Files of the request's way that make a thread or a lock."""
    found = set()
    for file in (it for room in ("service", "fullrank/monitor") for it in (ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                if name in MAKES:
                    found.add(str(file.relative_to(ROOT)))
    return found


def test_every_file_that_makes_a_thread_or_a_lock_is_in_its_tables() -> None:
    assert len(makers()) > 8
    assert {it for it in makers() if it not in TABLES} == set()


def test_every_lock_is_where_its_table_says() -> None:
    named = re.findall(r"^\| `(\w+)\.(\w+)`[^(|]*\(`([\w/.]+)`\)", TABLES, re.MULTILINE)
    assert len(named) > 10
    for owner, lock, file in named:
        source = (ROOT / file).read_text()
        assert f"class {owner}" in source, (owner, file)
        assert re.search(rf"self\.{lock} = (?:threading|asyncio)\.(?:Lock|Condition)\(", source), (lock, file)


@pytest.mark.parametrize("page", [ROOT / "docs" / "ARCHITECTURE.md", *DECISIONS], ids=lambda it: it.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", DECISIONS, ids=lambda it: it.stem)
def test_a_decision_is_one_page(page: Path) -> None:
    assert len(page.read_text().splitlines()) < 100
