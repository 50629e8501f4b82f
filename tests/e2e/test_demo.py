"""`make demo`, whole: it ends with a page, and says so when there is none."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


def demo(deploy: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.demo", *arguments]
    variables = os.environ | {"COLUMNS": "200"} | environment
    return subprocess.run(command, cwd=deploy.parent, env=variables, capture_output=True, text=True, check=False)


def test_without_prometheus_it_names_the_package(deploy: Path, tmp_path: Path) -> None:
    done = demo(deploy, PATH=str(tmp_path))
    assert done.returncode == 1
    assert "apt install prometheus" in done.stdout


@pytest.mark.soak
def test_the_containers_demo_swaps_the_encoder_and_ends_when_told(deploy: Path, tmp_path: Path) -> None:
    from tools.stack import call, service, wait

    log = tmp_path / "play.log"
    with service(tmp_path, threads=1, api_key="of the test only") as url, log.open("w") as output:
        command = [sys.executable, "-m", "tools.demo.play", "--url", url, "--healthy-seconds", "1"]
        variables = os.environ | {"FULLRANK_API_KEY": "of the test only"}
        player = subprocess.Popen(command, cwd=deploy.parent, env=variables, stdout=output, stderr=subprocess.STDOUT)
        try:
            assert wait(lambda: "serving fashion-collapsed" in log.read_text(), 180), log.read_text()
            assert wait(lambda: b'"fashion-directclr"' in call(f"{url}/spectrum"), 60)  # still the comparison
        finally:
            player.send_signal(signal.SIGTERM)
        assert player.wait(120) == 0
    assert re.search(r"(?m)^[1-9]\d* images embedded, 0 not answered$", log.read_text()), log.read_text()


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
