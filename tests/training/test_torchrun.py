"""Two processes under torchrun, on the CPU over gloo: one run, one artifact."""

import io
import json
from pathlib import Path

import pytest
import torch
from rich.console import Console

from models.artifact import load
from tests.support.torchrun import INTERRUPTED, SMALL
from tests.support.training import torchrun_script
from training.data import SAMPLE
from training.loop import Run, train


@pytest.fixture(scope="module")
def two(torchrun: Path) -> Path:
    return torchrun / "two"


def test_two_processes_make_one_artifact(two: Path, tmp_path: Path) -> None:
    """Negatives and BatchNorm are joint, so only the augmentations' draws tell the two runs' losses apart."""
    train(SMALL, Run(tmp_path / "one", data=SAMPLE), Console(file=io.StringIO()))
    one, both = (json.loads((out / "log.jsonl").read_text()) for out in (tmp_path / "one", two))
    assert both["loss"] == pytest.approx(one["loss"], rel=0.02)
    assert load(two / "encoder").reference is not None
    assert sorted(path.name for path in two.iterdir()) == ["checkpoint.pt", "encoder", "encoders", "log.jsonl"]


@pytest.mark.soak
def test_ctrl_c_leaves_a_checkpoint_that_every_process_goes_on_from(two: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    broken = torchrun_script(out, "interrupted")
    assert broken.returncode != 0
    assert f"stopped after step {INTERRUPTED} and saved; --resume goes on from there" in broken.stderr
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == INTERRUPTED
    resumed = torchrun_script(out, "resumed")
    assert resumed.returncode == 0, resumed.stderr[-4000:]
    assert load(out / "encoder").card.revision == load(two / "encoder").card.revision


@pytest.mark.soak
def test_a_checkpoint_that_only_some_processes_see_is_refused(two: Path) -> None:
    apart = torchrun_script(two, "apart")
    assert apart.returncode != 0
    assert apart.stderr.count("TrainingError: not every machine sees") == 2
