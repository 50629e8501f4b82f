"""Does the collapse guard cry wolf, and does it bark? Twenty healthy and twenty broken short runs on Fashion-MNIST.

    python -m benchmarks.guard [--only TEXT] [--width 16] [--epochs 4]

Each run is one of the methods, or one with a part that keeps it from collapsing taken out, or one that sees nothing
but black. A healthy run must not be called a collapse in any epoch; a broken one must be in some epoch. The last line
counts.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from models.artifact import Architecture
from training.checkpoint import TrainingError
from training.data import ImageSet, Split, load_data
from training.guard import IMAGES, Geometry, Guard, twins
from training.recipes import Recipe, recipe
from training.recipes.fashion import GENTLE
from training.trainer import Trainer

CONTRAST = {"temperature": 0.2}
SIAM = {"projection": 512, "bottleneck": 128}
WIDE = {"projection": 512, "hidden": 512}
BYOL = {"momentum": 0.97}
VICREG = WIDE | {"invariance": 1.0, "variance": 1.0, "covariance": 0.04}
DIRECT = BYOL | {"constant_momentum": False}
BARE = {"predictor": False, "stop_gradient": False}


@dataclass(frozen=True)
class Case:
    """A short run: healthy, or broken in a way that its name says."""

    name: str
    method: str
    options: dict[str, Any]
    broken: bool = False
    black: bool = False
    images: int = 2048
    settings: dict[str, Any] = field(default_factory=dict)


HEALTHY = (
    Case("SimCLR", "simclr", CONTRAST),
    Case("SimCLR, no projector", "simclr", CONTRAST | {"projector": "none"}),
    Case("SimCLR, linear projector", "simclr", CONTRAST | {"projector": "linear"}),
    Case("SimCLR, seed 1", "simclr", CONTRAST, settings={"seed": 1}),
    Case("SimCLR, batch 256", "simclr", CONTRAST, settings={"batch_size": 256}),
    Case("SimCLR, LARS", "simclr", CONTRAST, settings={"optimizer": "lars", "learning_rate": 2.0}),
    Case("DirectCLR", "directclr", {"d0": 32, "temperature": 0.1}),
    Case("DirectCLR, 1,024 images", "directclr", {"d0": 32, "temperature": 0.1}, images=1024),
    Case("DirectCLR, seed 1", "directclr", {"d0": 32, "temperature": 0.1}, settings={"seed": 1}),
    Case("BYOL", "byol", BYOL),
    Case("BYOL, no projector", "byol", BYOL | {"projector": False}),
    Case("BYOL, no average", "byol", {"momentum": None}),
    Case("BYOL, seed 1", "byol", BYOL, settings={"seed": 1}),
    Case("SimSiam", "simsiam", SIAM, settings={"learning_rate": 0.1}),
    Case("DirectPred", "directpred", DIRECT),
    Case("DirectCopy", "directcopy", DIRECT),
    Case("Barlow Twins", "barlow-twins", WIDE | {"scale": 0.02}),
    Case("VICReg", "vicreg", VICREG),
    Case("SIGReg", "sigreg", {"hidden": 256}),
    Case("SIGReg, AdamW", "sigreg", {"hidden": 256}, settings={"optimizer": "adamw", "learning_rate": 1e-3}),
)
BROKEN = (
    Case("BYOL, neither predictor nor stop-gradient", "byol", BARE, True),
    Case("the same, seed 1", "byol", BARE, True, settings={"seed": 1}),
    Case("the same, seed 2", "byol", BARE, True, settings={"seed": 2}),
    Case("the same, 1,024 images", "byol", BARE, True, images=1024),
    Case("the same, no projector", "byol", BARE | {"projector": False}, True),
    Case("the same, no projector, seed 1", "byol", BARE | {"projector": False}, True, settings={"seed": 1}),
    Case("BYOL, no predictor", "byol", BYOL | {"predictor": False}, True),
    Case("BYOL, no predictor, seed 1", "byol", BYOL | {"predictor": False}, True, settings={"seed": 1}),
    Case("BYOL, no stop-gradient", "byol", BYOL | {"stop_gradient": False}, True),
    Case("BYOL, no stop-gradient, seed 1", "byol", BYOL | {"stop_gradient": False}, True, settings={"seed": 1}),
    Case("the same, no projector, seed 2", "byol", BARE | {"projector": False}, True, settings={"seed": 2}),
    Case("SimSiam, neither", "simsiam", SIAM | BARE | {"projector": False}, True),
    Case("VICReg, no variance term", "vicreg", VICREG | {"variance": 0.0}, True),
    Case("VICReg, no variance term, seed 1", "vicreg", VICREG | {"variance": 0.0}, True, settings={"seed": 1}),
    Case("SIGReg, lambda 0", "sigreg", {"hidden": 256, "weight": 0.0}, True),
    Case("SimCLR on black images", "simclr", CONTRAST, True, black=True),
    Case("DirectCLR on black images", "directclr", {"d0": 32, "temperature": 0.1}, True, black=True),
    Case("BYOL on black images", "byol", BYOL, True, black=True),
    Case("Barlow Twins on black images", "barlow-twins", WIDE | {"scale": 0.02}, True, black=True),
    Case("VICReg on black images", "vicreg", VICREG, True, black=True),
)


def recipe_of(case: Case, width: int, epochs: int) -> Recipe:
    base = recipe(f"fashion-{case.method}")
    architecture = Architecture(name="resnet18", width=width, in_channels=1, stem="3x3/2")
    fixed: dict[str, Any] = {"options": case.options, "epochs": epochs, "batch_size": 64, "learning_rate": 0.15}
    return replace(base, architecture=architecture, augmentation=GENTLE, **(fixed | case.settings))


def verdicts(case: Case, images: ImageSet, width: int, epochs: int) -> Iterator[str | None]:
    """What the guard says after each epoch; a run that diverges is told so by the loop, and counts as found."""
    chosen = images.take(slice(case.images))
    if case.black:
        chosen = ImageSet(torch.zeros_like(chosen.images), chosen.labels)
    trainer = Trainer(recipe_of(case, width, epochs), Split.of(chosen, len(chosen) // 5, seed=0))
    guard = Guard([twin.geometry for twin in twins(trainer)], trainer.trivial_loss())
    for _ in range(epochs):
        try:
            record = trainer.train_epoch()
        except TrainingError as error:
            yield str(error)
            return
        h = trainer.rows().held_out[:IMAGES]
        yield guard(record, Geometry.of(h, trainer.project(h)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="runs whose name contains this")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    torch.set_num_threads(1)
    images, _ = load_data("fashion", given.data)
    assert isinstance(images, ImageSet)
    right = dict.fromkeys((False, True), 0)
    run = [case for case in (*HEALTHY, *BROKEN) if given.only in case.name]
    for case in run:
        # The first call decides, so the rest of a run that was called a collapse is not trained.
        said = next((words for words in verdicts(case, images, given.width, given.epochs) if words), None)
        right[case.broken] += bool(said) == case.broken
        print(json.dumps({"name": case.name, "broken": case.broken, "called": bool(said), "said": said}), flush=True)
    counts = [sum(case.broken == broken for case in run) for broken in (False, True)]
    print(f"healthy and left alone {right[False]} of {counts[0]}, broken and called so {right[True]} of {counts[1]}")


if __name__ == "__main__":
    main()
