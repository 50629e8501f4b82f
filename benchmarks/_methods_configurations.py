"""The configurations of the table of methods, at two scales."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from models.artifact import Architecture
from training.recipes import Recipe, recipe

BARE, TRAINED, OPTIMAL = "SimCLR, no projector", "BYOL, linear predictor", "DirectPred, optimal predictor"
LONGER, HARDER, EAGER = ", longer", ", crops from 0.08", ", predictor's rate x 10"
TWINS = {"initial": "Untrained, initial statistics", "measured": "Untrained, statistics of the data"}
LARGER = "SimCLR, batch 256", "Barlow Twins, batch 256"
LOW_RATE = ", rate 0.03"  # half of DirectPred's published step: its loss is a sum over directions, ours their mean


@dataclass(frozen=True)
class Scale:
    """How large a table: `small` takes an hour of one core, `full` wants an accelerator."""

    width: int
    images: int
    tests: int
    epochs: int
    batch_size: int
    momentum: float
    wide: int
    """Projector width of the methods that want a wide one."""
    batch_sizes: tuple[int, ...]
    longer: int
    """Epochs of the runs that ask whether a claim only wants time."""


SCALES = {
    "small": Scale(16, 4096, 2000, 3, 64, 0.97, 512, (256, 1024), 12),
    "full": Scale(64, 60_000, 10_000, 30, 512, 0.99, 2048, (64, 128, 256, 1024), 100),
}


@dataclass(frozen=True)
class Configuration:
    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    batch_size: int | None = None
    learning_rate: float | None = None
    """None: 0.2 at batch 128, by the root of the batch size."""
    epochs: int | None = None
    crop: tuple[float, float] | None = None
    """Share of the image that a view keeps; None: the recipe's."""
    reason: bool = False
    """Run with the first seed alone, to try an explanation."""


def configurations(scale: Scale) -> list[Configuration]:
    slow, wide = {"momentum": scale.momentum}, {"projection": scale.wide, "hidden": scale.wide}
    direct = slow | {"constant_momentum": False}
    siam = {"projection": scale.wide, "bottleneck": scale.wide // 4}
    contrast = {"temperature": 0.2}
    # The same losses over a constant: SGD's step, unlike LARS', would answer to their scale.
    barlow, vicreg = wide | {"scale": 10 / scale.wide}, wide | {"invariance": 1.0, "variance": 1.0, "covariance": 0.04}
    table = [
        Configuration("SimCLR", "simclr", contrast),
        Configuration("SimCLR, linear projector", "simclr", contrast | {"projector": "linear"}),
        Configuration("SimCLR, no projector", "simclr", contrast | {"projector": "none"}),
        Configuration("SimCLR, fixed low-rank projector", "simclr", contrast | {"projector": "low-rank"}),
        Configuration("SimCLR, trainable diagonal projector", "simclr", contrast | {"projector": "diagonal"}),
        Configuration("DirectCLR", "directclr", {"d0": scale.width * 2, "temperature": 0.2}),
        Configuration("BYOL", "byol", slow),
        Configuration("BYOL, no stop-gradient", "byol", slow | {"stop_gradient": False}),
        Configuration("BYOL, no predictor", "byol", slow | {"predictor": False}),
        Configuration("BYOL, no average", "byol", {"momentum": None}),
        Configuration(
            "BYOL, neither predictor nor stop-gradient", "byol", {"predictor": False, "stop_gradient": False}
        ),
        Configuration("BYOL, linear predictor", "byol", slow | {"linear_predictor": True}),
        Configuration(
            "BYOL, symmetric linear predictor, no average",
            "byol",
            {"momentum": None, "linear_predictor": True, "symmetric": True},
        ),
        Configuration("SimSiam", "simsiam", siam),
        Configuration("SimSiam, no stop-gradient", "simsiam", siam | {"stop_gradient": False}),
        Configuration("SimSiam, no predictor", "simsiam", siam | {"predictor": False}),
        Configuration("DirectPred", "directpred", direct),
        Configuration("DirectPred, as released", "directpred", direct | {"variant": "released"}),
        Configuration("DirectPred, every 5 steps", "directpred", direct | {"frequency": 5}),
        Configuration("DirectPred, optimal predictor", "directpred", direct | {"variant": "optimal"}),
        Configuration("DirectCopy", "directcopy", direct),
        Configuration("Barlow Twins", "barlow-twins", barlow),
        Configuration("Barlow Twins, lambda 42/d", "barlow-twins", barlow | {"redundancy": 42 / scale.wide}),
        Configuration("VICReg", "vicreg", vicreg),
        Configuration("SIGReg", "sigreg", {"hidden": scale.wide}),
    ]
    table += [
        Configuration(it.name + LOW_RATE, it.method, it.options, learning_rate=0.03)
        for it in table
        if it.name in (TRAINED, "DirectPred", OPTIMAL, "DirectCopy")
    ]
    for size in scale.batch_sizes:
        table.append(Configuration(f"SimCLR, batch {size}", "simclr", contrast, size))
        table.append(Configuration(f"Barlow Twins, batch {size}", "barlow-twins", barlow, size))
    base = {it.name: it for it in table}
    table += [
        replace(base[name], name=name + LONGER, epochs=scale.longer, reason=True)
        for name in ("SimCLR", BARE, TRAINED, "DirectPred", OPTIMAL, *LARGER)
    ]
    table += [replace(base[name], name=name + HARDER, crop=(0.08, 1.0), reason=True) for name in ("SimCLR", BARE)]
    eager = base[TRAINED].options | {"predictor_lr": 10.0}
    return [*table, replace(base[TRAINED], name=TRAINED + EAGER, options=eager, reason=True)]


def recipe_of(configuration: Configuration, scale: Scale, seed: int) -> Recipe:
    """Fashion-MNIST's recipe with this method; the learning rate follows the root of the batch size."""
    batch_size, base = configuration.batch_size or scale.batch_size, recipe("fashion-simclr")
    return replace(
        base,
        name=f"fashion-{configuration.method}",
        method=configuration.method,
        options=configuration.options,
        architecture=Architecture(name="resnet18", width=scale.width, in_channels=1, stem="3x3/2"),
        augmentation=replace(base.augmentation, crop=configuration.crop or base.augmentation.crop),
        epochs=configuration.epochs or scale.epochs,
        batch_size=batch_size,
        learning_rate=configuration.learning_rate or 0.2 * math.sqrt(batch_size / 128),
        seed=seed,
    )
