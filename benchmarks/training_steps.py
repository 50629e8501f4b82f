"""Steps a second of a training run, alone and with others of its kind beside it on the same device.

    python -m benchmarks.training_steps cifar10-byol --data DIR --device cuda --width 16 --stem 3x3/2 --batch-size 128
    python -m benchmarks.training_steps cifar10-byol --data DIR --device cuda --processes 15

The processes start together, after each has done five steps. Each has one CPU thread, as `fullrank train --threads 1`.
With one process on a CUDA device it also says how long a step's kernels keep the device busy.
"""

import argparse
import sys
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, get_args

import torch
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessException, spawn
from torch.profiler import ProfilerActivity, profile

from benchmarks.training_speed import resident
from models.backbones.resnet import Stem
from training.data import DataError, ImageSet, Split, load_data
from training.distributed import device_of
from training.recipes import Recipe, recipe
from training.trainer import LOOK_BACK, Trainer

WARM, PROFILED = 5, 5


def held_out(train: ImageSet) -> int:
    return min(5000, len(train) // 4)


def measure(_: int, chosen: Recipe, options: argparse.Namespace, barrier: Any, found: Any) -> None:
    """Put (steps, seconds, CPU seconds, milliseconds of kernels in a step) into `found`."""
    torch.set_num_threads(1)
    train: Any = load_data(chosen.data, options.data)[0]
    trainer = Trainer(chosen, Split.of(train, held_out(train), 0), options.device, compiled=options.compile)
    trainer.method.train()

    source = resident(trainer)

    def steps(n: int) -> None:
        for views in islice(source, n):
            trainer.train_step(views)
        trainer.clock(wait=True)

    steps(WARM)
    barrier.wait()
    done, started, cpu = 0, time.perf_counter(), time.process_time()
    at_once = LOOK_BACK if trainer.asynchronous else 1
    while time.perf_counter() - started < options.seconds:
        steps(at_once)
        done += at_once
    spent, cpu = time.perf_counter() - started, time.process_time() - cpu
    kernels = busy(steps) if trainer.device.type == "cuda" and options.processes == 1 else 0.0
    found.put((done, spent, cpu, kernels))


def busy(steps: Any) -> float:
    """Milliseconds that a step's kernels take on the device."""
    with profile(activities=[ProfilerActivity.CUDA]) as watched:
        steps(PROFILED)
    events = [event for event in watched.key_averages() if str(event.device_type).endswith("CUDA")]
    return float(sum(event.self_device_time_total for event in events)) / 1e3 / PROFILED


def chosen_by(options: argparse.Namespace) -> Recipe:
    """The recipe with the options' shape and batch. Raises ValueError, or DataError for data that are not there."""
    chosen = recipe(options.recipe)
    shape = {key: value for key in ("width", "stem") if (value := getattr(options, key)) is not None}
    architecture: Any = chosen.architecture
    chosen = replace(chosen, architecture=architecture.model_copy(update=shape))
    chosen = replace(chosen, batch_size=options.batch_size or chosen.batch_size)
    device_of(options.device)
    train = load_data(chosen.data, options.data)[0]
    if not isinstance(train, ImageSet):
        raise ValueError(f"{chosen.data}: only data sets that are kept in memory are measured, cifar10 for example")
    if chosen.batch_size > len(train) - held_out(train):
        raise ValueError(f"--batch-size: {chosen.batch_size} is more than the {len(train) - held_out(train)} images")
    return chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--width", type=int)
    parser.add_argument("--stem", choices=get_args(Stem))
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=6.0)
    options = parser.parse_args()
    for flag in ("width", "batch_size", "processes", "seconds"):
        if (value := getattr(options, flag)) is not None and value <= 0:
            parser.error(f"--{flag.replace('_', '-')}: {value} must be above 0")
    try:
        chosen = chosen_by(options)
    except (ValueError, DataError, OSError) as error:
        parser.error(str(error))
    context = multiprocessing.get_context("spawn")
    found = context.Queue()
    together = chosen, options, context.Barrier(options.processes), found
    try:
        # where one fails, it ends the others
        spawn(measure, together, options.processes)  # type: ignore[no-untyped-call]
    except ProcessException as error:
        sys.exit(f"a process failed: {str(error).strip().splitlines()[-1]}")
    runs = [found.get() for _ in range(options.processes)]
    rate = sum(steps / spent for steps, spent, _, _ in runs)
    print("| processes | steps a second, together | views a second | CPU ms a step | device ms a step |")
    print("|---|---|---|---|---|")
    cpu = 1e3 * sum(it[2] for it in runs) / sum(it[0] for it in runs)
    cells = [f"{rate:.1f}", f"{2 * rate * chosen.batch_size:.0f}", f"{cpu:.1f}", f"{runs[0][3]:.1f}"]
    print(f"| {options.processes} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
