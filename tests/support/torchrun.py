"""The script that torchrun runs for the tests: a small run, whole, interrupted, resumed or apart.

A whole run first does what test_distributed compares.
"""

import io
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from tests.support import distributed
from tests.support.training import TINY
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
        distributed.write(out.parent / "steps.safetensors")
    if how == "interrupted":
        interrupt_the_launcher()
    if second:
        checkpoint.save = refuse
    if second and how == "apart":
        out = out / "of its own"
    train(SMALL, Run(out, data=SAMPLE, resume=how in ("resumed", "apart")), Console(file=io.StringIO()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
