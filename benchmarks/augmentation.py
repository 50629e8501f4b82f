"""Augmentation against the training step it feeds, in one run on one thread: milliseconds and share.

    python -m benchmarks.augmentation [RECIPE]

Two views of a batch of the recipe's size, then the step on them; medians of interleaved rounds.
"""

import statistics
import sys
import time

import torch

from training.data import SAMPLE, SOURCES
from training.loop import Split, Trainer
from training.recipes import recipe

ROUNDS = 9


def main() -> None:
    torch.set_num_threads(1)
    chosen = recipe(sys.argv[1] if len(sys.argv) > 1 else "fashion-directclr")
    images = SOURCES["fashion"].read(SAMPLE, "train")
    trainer = Trainer(chosen, Split.of(images, 100, seed=0))
    index = torch.arange(chosen.batch_size)
    augmenting, stepping = [], []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        views = trainer.views(index)
        middle = time.perf_counter()
        trainer.train_step(views, step=0)
        augmenting.append(middle - start)
        stepping.append(time.perf_counter() - middle)
    view, step = statistics.median(augmenting), statistics.median(stepping)
    print(f"{chosen.name}, batch {chosen.batch_size}: two views {view * 1e3:.1f} ms, step {step * 1e3:.1f} ms", end="")
    print(f", augmentation {view / (view + step):.1%} of both")


if __name__ == "__main__":
    main()
