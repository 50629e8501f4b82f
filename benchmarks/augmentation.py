"""Augmentation against the training step it feeds, in one run on one thread: milliseconds of CPU time, and share.

    python -m benchmarks.augmentation [RECIPE] [--threads N]

Two views of a batch of the recipe's size, then the step on them, on random pixels; medians of interleaved rounds of
the process's own CPU time, which other load hardly moves. On one thread of an idle machine it is the wall's.
"""

import argparse
import statistics
import time

import torch
from torch import Generator

from training.data import SOURCES, ImageSet, Split
from training.loop import Trainer
from training.recipes import recipe

ROUNDS = 7


def random_images(name: str, count: int) -> ImageSet:
    """Pixels of the size that the data set of that name has, from a fixed seed."""
    source, generator = SOURCES[name], Generator().manual_seed(0)
    shape = (count, source.channels, source.size, source.size)
    return ImageSet(torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator), torch.arange(count) % 10)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", nargs="?", default="fashion-directclr")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    chosen = recipe(arguments.recipe)
    images = random_images(chosen.data, chosen.batch_size + 32)
    trainer = Trainer(chosen, Split.of(images, 32, seed=0))
    batch = images.images[: chosen.batch_size]
    augmenting, stepping = [], []
    for _ in range(ROUNDS):
        start = time.process_time()
        views = trainer.views(batch, batch)
        middle = time.process_time()
        trainer.train_step(views)
        augmenting.append(middle - start)
        stepping.append(time.process_time() - middle)
    view, step = statistics.median(augmenting), statistics.median(stepping)
    print(f"{chosen.name}, batch {chosen.batch_size}: two views {view * 1e3:.1f} ms, step {step * 1e3:.1f} ms", end="")
    print(f", augmentation {view / (view + step):.1%} of both")


if __name__ == "__main__":
    main()
