"""The pages do what they say: their blocks, in order, against a real server.

A block that cannot run here has a comment before it, `<!-- not run here: why -->`; tests/tools/test_blocks.py checks
its commands against the command line.
"""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.settings import Settings
from tests.support.process import running

ROOT = Path(__file__).parents[3]
BLOCK = re.compile(r"(<!-- not run here: .+? -->\n)?```(sh|python|text|json)\n(.*?)```", re.DOTALL)
PAGES = (
    "howto/export.md",
    "howto/gate.md",
    "howto/own-method.md",
    "howto/report.md",
    "howto/send-images.md",
    "howto/thresholds.md",
    "howto/train.md",
    "tutorial/first-alert.md",
    "tutorial/own-encoder.md",
)
# They train, or make four reports.
SLOW = {"howto/own-method.md", "howto/report.md", "howto/train.md", "tutorial/own-encoder.md"}


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(Settings(threads=1)) as (address, _):
        yield address


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of the repository as far as the pages use it, with the command `fullrank` on the path."""
    for name in ("examples", "models", "tools", "training"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name, words in (("bin/fullrank", f"{sys.executable} -m cli"), (".venv/bin/python", sys.executable)):
        command = tmp_path / name
        command.parent.mkdir(parents=True)
        command.write_text(f'#!/bin/sh\nexec {words} "$@"\n')
        command.chmod(0o755)
    return tmp_path


@pytest.mark.parametrize("page", [pytest.param(it, marks=pytest.mark.soak) if it in SLOW else it for it in PAGES])
def test_every_block_runs_and_gives_what_it_says(
    page: str, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"}
    namespace: dict[str, Any] = {}
    printed = ""
    ran = 0
    for left_out, language, written in BLOCK.findall((ROOT / "docs" / page).read_text()):
        if left_out:
            continue
        block = written.replace("http://127.0.0.1:8000", url).replace("127.0.0.1:8000", url.removeprefix("http://"))
        ran += 1
        if language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", block]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            printed = done.stdout
        elif language == "text":
            assert printed == block
        elif language == "json":
            assert json.loads(printed) == json.loads(block)
        elif page == "howto/own-method.md":
            with Path("mine.py").open("a") as mine:
                mine.write(block)
        else:
            run(block, namespace)
    assert ran


def test_the_readmes_image_gets_the_answer_that_the_readme_shows(url: str) -> None:
    text = (ROOT / "README.md").read_text()
    (command,) = re.findall(r"^curl .*$", text, re.MULTILINE)
    (shown,) = re.findall(r"```json\n(.*), …\]\]\}\n```", text)
    command = command.replace("http://127.0.0.1:8000", url)
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    answer, said = json.loads(done.stdout), json.loads(shown + "]]}")
    (row,), (begin,) = answer.pop("embeddings"), said.pop("embeddings")
    assert answer == said
    assert row[: len(begin)] == pytest.approx(begin, abs=1e-4)


def run(block: str, namespace: dict[str, Any]) -> None:
    """Run a block; where a line says `# => value`, its expression must have that value."""
    lines = block.splitlines()
    for statement in ast.parse(block).body:
        source = ast.get_source_segment(block, statement)
        assert source is not None
        _, arrow, value = lines[statement.end_lineno - 1].partition("  # => ")  # type: ignore[operator]
        if arrow:
            assert repr(eval(source, namespace)) == value, source
        else:
            exec(source, namespace)
