"""`make demo`, whole: it ends with a page, and says so when there is none."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def demo(deploy: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tools.demo", *arguments]
    variables = os.environ | {"COLUMNS": "200"} | environment
    return subprocess.run(command, cwd=deploy.parent, env=variables, capture_output=True, text=True, check=False)


def test_without_prometheus_it_names_the_package(deploy: Path, tmp_path: Path) -> None:
    done = demo(deploy, PATH=str(tmp_path))
    assert done.returncode == 1
    assert "apt install prometheus" in done.stdout


def test_a_page_about_the_service_alone_is_no_page_of_the_encoder() -> None:
    """On a busy machine EmbeddingServiceDown may fire first; it names no revision."""
    from tools.demo.__main__ import Demo
    from tools.stack import Prometheus

    class Answers(Prometheus):
        def alerts(self) -> list[dict[str, Any]]:
            labels = [{}, {"revision": "b"}, {"revision": "a"}, {"revision": "a"}]
            states = ["firing", "firing", "pending", "firing"]
            return [
                {"labels": {"severity": "page", **given}, "state": state}
                for given, state in zip(labels, states, strict=True)
            ]

    fired = Demo(Answers("http://nowhere"), 0.0).fired("a")
    assert fired == [{"labels": {"severity": "page", "revision": "a"}, "state": "firing"}]


@pytest.mark.soak
def test_the_containers_demo_swaps_the_encoder_and_ends_when_told(deploy: Path, tmp_path: Path) -> None:
    from tools.demo import encoders
    from tools.stack import call, service, wait

    log = tmp_path / "play.log"
    folder = encoders(tmp_path / "encoders")  # what the containers mount
    first = folder / "fashion-byol"
    with (
        service(tmp_path, threads=1, encoder=first, encoders_dir=folder, api_key="of the test only") as url,
        log.open("w") as output,
    ):
        command = [sys.executable, "-m", "tools.demo.play", "--url", url, "--healthy-seconds", "1"]
        variables = os.environ | {"FULLRANK_API_KEY": "of the test only"}
        player = subprocess.Popen(command, cwd=deploy.parent, env=variables, stdout=output, stderr=subprocess.STDOUT)
        try:
            assert wait(lambda: "serving fashion-collapsed" in log.read_text(), 180), log.read_text()
            assert wait(lambda: b'"fashion-byol"' in call(f"{url}/spectrum"), 60)  # still the comparison
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
    done = demo(deploy, "--collapsed", "fashion-byol", "--limit", "130")
    assert done.returncode == 1
    assert "no page fired" in done.stdout
