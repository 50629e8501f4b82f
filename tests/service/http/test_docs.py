"""docs/howto/send-images.md does what it says."""

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
PAGE = (ROOT / "docs" / "howto" / "send-images.md").read_text()
BLOCKS = re.findall(r"```(sh|python|text|json)\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with running(Settings(threads=1)) as (address, _):
        yield address


def test_every_block_runs_and_gives_what_it_says(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    namespace: dict[str, Any] = {}
    printed = ""
    for language, written in BLOCKS:
        block = written.replace("http://127.0.0.1:8000", url).replace("127.0.0.1:8000", url.removeprefix("http://"))
        if language == "sh":
            command = ["bash", "-euo", "pipefail", "-c", block]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            printed = done.stdout
        elif language == "text":
            assert printed == block
        elif language == "json":
            assert json.loads(printed) == json.loads(block)
        else:
            run(block, namespace)
    assert {language for language, _ in BLOCKS} == {"sh", "python", "text", "json"}


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
