"""CONTRIBUTING.md, followed word for word in a copy of the repository."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
SECTIONS = dict(re.findall(r"^## An? (.+?)\n(.*?)(?=^## An? |\Z)", TEXT, re.MULTILINE | re.DOTALL))
FENCE = re.compile(r"^(````*)(\w+)(?: ([\w./-]+))?( \(at its end\))?\n(.*?)^\1$", re.MULTILINE | re.DOTALL)
# Large, and read only: linked instead of copied.
LINKED = ("models/pretrained", "tools/demo/encoders", "training/data/fashion-sample")
COPIED = ("cli", "deploy", "docs", "examples", "fullrank", "models", "service", "tests", "theory", "tools", "training")
NEEDS = {"alert": "promtool"}
SLOW = {"method", "route"}  # they train, and start the service


@dataclass(frozen=True)
class Step:
    """A block of the text: a file, its end, a change of it, or commands."""

    kind: str
    file: str
    at_end: bool
    body: str


def steps(section: str) -> Iterator[Step]:
    for _, kind, file, at_end, body in FENCE.findall(section):
        yield Step(kind, file, bool(at_end), body)


def change(text: str, diff: str) -> str:
    """`text` with the lines of a diff; what it keeps and removes must stand there once."""
    lines = diff.splitlines()
    old = "\n".join(line[1:] for line in lines if line[0] in " -")
    new = "\n".join(line[1:] for line in lines if line[0] in " +")
    assert text.count(old) == 1, f"{text.count(old)} times in the file:\n{old}"
    return text.replace(old, new)


def follow(step: Step, root: Path) -> None:
    if step.kind == "sh":
        for command in step.body.strip().splitlines():
            environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
            words = ["bash", "-c", command.replace("python ", f"{sys.executable} ", 1)]
            done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        return
    path = root / step.file
    if step.kind == "diff":
        path.write_text(change(path.read_text(), step.body))
    elif step.at_end:
        path.write_text(path.read_text() + step.body)
    else:
        assert not path.exists()
        path.write_text(step.body)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """The repository's files, without what is large."""
    skip = {ROOT / it for it in LINKED}

    def ignore(folder: str, names: list[str]) -> list[str]:
        return [it for it in names if it.startswith((".", "__pycache__")) or Path(folder, it) in skip]

    for name in COPIED:
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignore)
    for name in ("pyproject.toml", "docker-compose.yml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in LINKED:
        (tmp_path / name).symlink_to(ROOT / name)
    return tmp_path


def test_the_text_covers_what_people_add() -> None:
    assert set(SECTIONS) == {"method", "backbone", "data set", "statistic", "route", "alert"}
    for name, section in SECTIONS.items():
        found = list(steps(section))
        assert found[-1].kind == "sh", name
        words = [line for line in FENCE.sub("", section).splitlines() if line]
        assert len(words) <= 12, name


@pytest.mark.parametrize("name", [pytest.param(it, marks=pytest.mark.soak) if it in SLOW else it for it in SECTIONS])
def test_its_steps_work(name: str, copy: Path) -> None:
    if name in NEEDS and shutil.which(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not on the PATH (Debian package prometheus)")
    for step in steps(SECTIONS[name]):
        follow(step, copy)


def test_a_change_that_fits_nowhere_is_noticed() -> None:
    assert change("a\nb\nc\n", " a\n+x\n-b\n") == "a\nx\nc\n"
    for text in ("b\n", "a\nb\na\nb\n"):
        with pytest.raises(AssertionError, match="times in the file"):
            change(text, " a\n-b\n")
