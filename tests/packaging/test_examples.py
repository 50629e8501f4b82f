"""The examples run with the library's wheel alone, and show what they say they show."""

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.support.distributions import ROOT

EXAMPLES = ROOT / "examples"
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


def output_of(python: Path, name: str) -> str:
    return subprocess.run(
        [python, "-I", EXAMPLES / name], check=True, capture_output=True, text=True, env=ENVIRONMENT, timeout=600
    ).stdout


def number(text: str, line: str, name: str) -> float:
    found = re.search(rf"^{line}:.*{name} ([-\d.e]+)", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def test_beside_pytorch_tells_the_healthy_from_the_broken(bare: Path) -> None:
    text = output_of(bare, "beside_pytorch.py")
    assert "healthy: 2048 rows" in text
    assert number(text, "healthy", "effective rank") > 4 * number(text, "broken", "effective rank")


def test_the_training_loop_shows_both_kinds_of_collapse(bare: Path) -> None:
    text = output_of(bare, "training_loop.py")
    rank, variance = (
        {name: number(text, f"{name} epoch 6", measure) for name in ("pull", "spread", "vicreg")}
        for measure in ("effective rank", "variance")
    )
    assert variance["pull"] < 0.01 < 10 < min(variance["spread"], variance["vicreg"])  # complete
    assert number(text, "pull epoch 6", "mean cosine") > 0.9
    assert rank["spread"] < 0.7 * rank["vicreg"]  # dimensional
    assert rank["pull"] > rank["vicreg"]  # which the rank alone would have called the best


@pytest.fixture
def server(with_extras: Path) -> Iterator[str]:
    with subprocess.Popen(
        [with_extras, "-I", EXAMPLES / "other_server.py", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    ) as process:
        assert process.stdout is not None
        yield process.stdout.readline().strip()
        process.terminate()


def test_the_other_server_exports_its_spectrum(server: str) -> None:
    rows = np.random.default_rng(0).normal(size=(600, 16)).round(3)
    for part in (*np.array_split(rows, 6), rows[:50]):
        answer = httpx.post(f"{server}/embed", json=part.tolist())
        assert np.shape(answer.json()) == (len(part), 32)
    assert httpx.post(f"{server}/embed", json=[["x"]]).status_code == 400
    labels = 'model="projection",revision="1"'
    metrics = httpx.get(f"{server}/metrics").text
    assert f"fullrank_effective_rank{{{labels}" in metrics
    found = dict(re.findall(r'fullrank_rows_total\{fate="(\w+)".*?\} ([\d.]+)', metrics))
    assert float(found["sampled"]) + float(found["duplicate"]) <= 650
    assert found["dropped"] == "0.0"
