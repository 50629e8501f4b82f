"""What kept memory, huge pages and small maps as matrix products are worth to training on a CPU, in CPU seconds.

    python -m benchmarks.training_memory [--width 32] [--stem 3x3/2] [--batch-size 128] [--rounds 3]

Each turn is a process of its own on one thread, since an allocator is set once in a process: the variants take turns,
and a ratio is the median of the rounds, with their range. Views of random images, SimCLR's steps, ResNet-18.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from dataclasses import replace
from unittest.mock import patch

BASE = "before, float32"
VARIANTS = {
    BASE: ("float32", False, False),
    "small maps, float32": ("float32", True, False),
    "today, float32": ("float32", True, True),
    "small maps, bfloat16": ("bfloat16", True, False),
    "today, bfloat16": ("bfloat16", True, True),
}
"""Precision, small maps as matrix products, kept memory and huge pages."""


def turn(name: str, width: int, stem: str, batch_size: int, steps: int) -> dict[str, float]:
    """Views per CPU second, the kernel's share of the time, page faults a step, and the process's peak in MB."""
    numbers, small, kept = VARIANTS[name]
    if kept:
        from training.memory import keep_freed

        keep_freed()
    import torch

    from benchmarks.augmentation import random_images
    from training.data import Split
    from training.recipes import recipe
    from training.trainer import Trainer

    torch.set_num_threads(1)
    chosen = recipe("cifar10-simclr")
    architecture = chosen.architecture.model_copy(update={"width": width, "stem": stem})
    chosen = replace(chosen, batch_size=batch_size, architecture=architecture)
    images = random_images("cifar10", batch_size + 32)
    with patch("training.trainer.quicken", lambda method: None) if not small else patch.dict({}):
        trainer = Trainer(chosen, Split.of(images, 32, seed=0), numbers=numbers)  # type: ignore[arg-type]
    trainer.method.train()

    def step() -> None:
        trainer.train_step(trainer.views(images.images[:batch_size], images.images[:batch_size]))

    step()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    kernel = after.ru_stime - before.ru_stime
    seconds = after.ru_utime - before.ru_utime + kernel
    return {
        "rate": 2 * batch_size * steps / seconds,
        "kernel": kernel / seconds,
        "faults": (after.ru_minflt - before.ru_minflt) / steps,
        "peak": after.ru_maxrss / 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--stem", choices=("3x3", "3x3/2", "7x7"), default="3x3/2")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8, help="of each turn, after two to warm up")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--turn", choices=VARIANTS, help="one variant's turn, in this process")
    given = parser.parse_args()
    if given.turn:
        print(json.dumps(turn(given.turn, given.width, given.stem, given.batch_size, given.steps)))
        return
    options = ["--width", given.width, "--stem", given.stem, "--batch-size", given.batch_size, "--steps", given.steps]
    environment = {key: value for key, value in os.environ.items() if key != "THP_MEM_ALLOC_ENABLE"}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in VARIANTS}
    for _ in range(given.rounds):
        for name, turns in found.items():
            command = [sys.executable, "-m", "benchmarks.training_memory", "--turn", name, *map(str, options)]
            done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            turns.append(json.loads(done.stdout.splitlines()[-1]))
            print(name, turns[-1], file=sys.stderr, flush=True)
    print(f"| loop | views per CPU second | over {BASE} | kernel's share | faults a step | peak, MB |")
    print("|---|---|---|---|---|---|")
    for name, turns in found.items():
        ratios = [mine["rate"] / base["rate"] for mine, base in zip(turns, found[BASE], strict=True)]
        rate, kernel, faults, peak = (statistics.median(it[key] for it in turns) for key in turns[0])
        told = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
        print(f"| {name} | {rate:,.0f} | {told} | {kernel:.1%} | {faults:,.0f} | {peak:,.0f} |")


if __name__ == "__main__":
    main()
