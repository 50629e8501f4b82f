"""`make demo`, whole: it ends with a page, and says so when there is none."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def demo(deploy: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.demo", *arguments]
    variables = os.environ | {"COLUMNS": "200"} | environment
    return subprocess.run(command, cwd=deploy.parent, env=variables, capture_output=True, text=True, check=False)


def test_without_prometheus_it_names_the_package(deploy: Path, tmp_path: Path) -> None:
    done = demo(deploy, PATH=str(tmp_path))
    assert done.returncode == 1
    assert "apt install prometheus" in done.stdout


@pytest.mark.soak
def test_a_collapse_ends_in_a_page(tool: Callable[[str], str], deploy: Path) -> None:
    tool("prometheus")
    done = demo(deploy)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "firing after" in done.stdout
    assert "docs/runbooks/Embedding" in done.stdout


@pytest.mark.soak
def test_no_collapse_no_page(tool: Callable[[str], str], deploy: Path) -> None:
    tool("prometheus")
    done = demo(deploy, "--collapsed", "fashion-directclr", "--limit", "130")
    assert done.returncode == 1
    assert "no page fired" in done.stdout
