"""Two processes under torchrun, on the CPU over gloo: one run, one artifact.

This file is also the script that torchrun runs. A whole run first does what test_distributed compares.
"""

import io
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor

from models.artifact import load
from tests.training import test_distributed
from tests.training.conftest import TINY, torchrun_script
from training import checkpoint
from training.data import SAMPLE
from training.loop import Run, Trainer, train
from training.recipes import recipe

SMALL = replace(recipe("fashion-simclr"), architecture=TINY, options={"hidden": 16}, epochs=1)
INTERRUPTED = 3


def interrupt_the_launcher() -> None:
    """After a few steps the first process sends its parent what Ctrl-C does; all wait until it comes back to them."""
    requests, step, stops = checkpoint.stop_requests, Trainer.train_step, list[Event]()

    @contextmanager
    def remembered() -> Iterator[Event]:
        with requests() as stop:
            stops.append(stop)
            yield stop

    def interrupted(trainer: Trainer, views: Tensor) -> Tensor:
        loss = step(trainer, views)
        if trainer.step == INTERRUPTED:
            if os.environ["RANK"] == "0":
                os.kill(os.getppid(), signal.SIGINT)
            assert stops[0].wait(600)
        return loss

    checkpoint.stop_requests = remembered
    Trainer.train_step = interrupted  # type: ignore[method-assign]


def refuse(*_: Any) -> None:
    raise AssertionError("only the first process may write a checkpoint")


def main(out: Path, how: str) -> None:
    torch.set_num_threads(1)
    second = os.environ.get("RANK") == "1"
    if how == "whole":
        test_distributed.write(out.parent / "steps.safetensors")
    if how == "interrupted":
        interrupt_the_launcher()
    if second:
        checkpoint.save = refuse
    if second and how == "apart":
        out = out / "of its own"
    train(SMALL, Run(out, data=SAMPLE, resume=how in ("resumed", "apart")), Console(file=io.StringIO()))


@pytest.fixture(scope="module")
def two(torchrun: Path) -> Path:
    return torchrun / "two"


def test_two_processes_make_one_artifact(two: Path, tmp_path: Path) -> None:
    """Negatives and BatchNorm are joint, so only the augmentations' draws tell the two runs' losses apart."""
    train(SMALL, Run(tmp_path / "one", data=SAMPLE), Console(file=io.StringIO()))
    one, both = (json.loads((out / "log.jsonl").read_text()) for out in (tmp_path / "one", two))
    assert both["loss"] == pytest.approx(one["loss"], rel=0.02)
    assert load(two / "encoder").reference is not None
    assert sorted(path.name for path in two.iterdir()) == ["checkpoint.pt", "encoder", "log.jsonl"]


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


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
