"""Experiments A to I: what each is to show, its cases, and what it costs."""

import math
from dataclasses import dataclass, field, replace
from typing import Any

from models.artifact import Architecture
from training.augment import SIMCLR_CIFAR
from training.recipes import Recipe, recipe
from training.recipes.fashion import GENTLE

CONTRAST = {"temperature": 0.2}
SIAM = {"projection": 512, "bottleneck": 128}
BARE_SIAM = SIAM | {"projector": False}
BARE_BYOL = {"projector": False, "momentum": 0.97}


@dataclass(frozen=True)
class Case:
    name: str
    method: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    epochs: int | None = None
    """None: the experiment's."""


@dataclass(frozen=True)
class Experiment:
    """Cases on the same data for the same number of epochs, and what they are to show."""

    says: str
    data: str
    images: int | None
    width: int
    epochs: int
    cases: tuple[Case, ...]
    cpu_hours: float
    """Of one thread of this project's development machine in bfloat16, all cases and seeds with their measurements.
    A to C, E and I as measured; others from steps that were timed, with a tenth for measuring."""
    gpu_hours: float
    """Of one NVIDIA H200, one run after the other: D and F as timed, the others at 16 to 26 ms a step, which the host
    takes to launch a step's kernels. Networks this narrow keep the card busy for 3 ms of it."""
    seeds: int = 2
    few_labels: bool = False
    """Fine-tune on 1 % and 10 % of the labels as well."""
    settings: dict[str, Any] = field(default_factory=dict)


def _linear(name: str, method: str = "directpred", **options: Any) -> Case:
    return Case(name, method, {"momentum": 0.99} | options)


LINEAR = (
    _linear("BYOL, linear predictor", "byol", linear_predictor=True, constant_momentum=True),
    _linear("DirectPred"),
    _linear("DirectPred, epsilon 0.01", epsilon=0.01),
    _linear("DirectPred, as released", variant="released"),
    _linear("DirectPred, as released, epsilon 0.1", variant="released", epsilon=0.1),
    _linear("DirectPred, optimal predictor", variant="optimal"),
    _linear("DirectCopy", "directcopy"),
    _linear("DirectPred, predictor trained", frequency=1_000_000_000),
)
"""The last is BYOL's linear predictor in DirectPred's network and with its views, which in the first are BYOL's: less
saturation, and a projector whose BatchNorm has a scale and a shift."""
TWO_LAYERS = {"momentum": 0.99, "constant_momentum": True}
TIAN = {"batch_size": 128, "learning_rate": 0.06, "weight_decay": 2e-4, "schedule": "constant", "warmup": 0.0}
SIMCLR_ON_CIFAR: dict[str, Any] = {"augmentation": SIMCLR_CIFAR, "batch_size": 128, "learning_rate": 0.3}
PROJECTORS = tuple(
    Case(f"SimCLR, {kind} projector", "simclr", {"temperature": 0.5, "projector": kind})
    for kind in ("mlp", "linear", "none")
)


BARLOW = {"projection": 512, "hidden": 512, "scale": 0.1}


def _batches(equal_steps: int | None = None) -> tuple[Case, ...]:
    """Five batch sizes, two rates, two methods; with `equal_steps` the epochs that a batch of 256 takes, the others'
    grow and shrink with the batch, so that all take as many steps."""
    cases = []
    for size in (64, 128, 256, 512, 1024):
        epochs = equal_steps * size // 256 if equal_steps else None
        for rate in (0.5, 1.0):
            lars = {"optimizer": "lars", "batch_size": size, "learning_rate": rate * size / 256}
            named = f"batch {size}, rate {rate}"
            cases.append(Case(f"SimCLR, {named}", "simclr", {"temperature": 0.5}, lars, epochs))
            cases.append(Case(f"Barlow Twins, {named}", "barlow-twins", BARLOW, lars, epochs))
    return tuple(cases)


FEW_LABELS = (
    Case("SimCLR", "simclr", {"temperature": 0.2}),
    Case("BYOL", "byol", {"momentum": 0.99}),
    Case("Barlow Twins", "barlow-twins", BARLOW | {"scale": 0.02}),
)


EXPERIMENTS: dict[str, Experiment] = {
    "A": Experiment(
        "SimCLR's z loses dimensions as it trains (Jing et al., figure 2), and more of them with more weight decay",
        "fashion",
        4096,
        16,
        8,
        tuple(Case(f"SimCLR, weight decay {d:g}", "simclr", CONTRAST, {"weight_decay": d}) for d in (1e-4, 1e-3, 3e-3)),
        0.2,
        0.03,
        3,
        settings={"batch_size": 64, "learning_rate": 0.3},
    ),
    "B": Experiment(
        "the tails of h and z without a projector, with a linear one, an MLP, and DirectCLR (figures 7 and 9)",
        "cifar10",
        None,
        32,
        9,
        (*PROJECTORS, Case("DirectCLR", "directclr", {"temperature": 0.5, "d0": 45})),
        2.5,
        0.12,
        2,
        settings=SIMCLR_ON_CIFAR,
    ),
    "C": Experiment(
        "without projector, stop-gradient and predictor keep h from collapsing (Tian et al.; Chen & He)",
        "fashion",
        4096,
        16,
        3,
        (
            Case("BYOL, no projector", "byol", BARE_BYOL),
            Case(
                "BYOL, no projector, no predictor", "byol", {"projector": False, "momentum": 0.97, "predictor": False}
            ),
            Case("BYOL, no projector, no stop-gradient", "byol", BARE_BYOL | {"stop_gradient": False}),
            Case("SimSiam, no projector", "simsiam", BARE_SIAM),
            Case("SimSiam, no projector, no predictor", "simsiam", BARE_SIAM | {"predictor": False}),
            Case(
                "SimSiam, no projector, no stop-gradient",
                "simsiam",
                SIAM | {"projector": False, "stop_gradient": False},
            ),
        ),
        0.2,
        0.02,
        3,
        settings={"batch_size": 64, "learning_rate": 0.2 * math.sqrt(0.5)},
    ),
    "D": Experiment(
        "DirectPred is better than a gradient-trained linear predictor and on par with BYOL's two layers (Tian et al.)",
        "cifar10",
        None,
        16,
        30,
        (
            Case("BYOL, two layers", "byol", TWO_LAYERS),
            *LINEAR,
            Case("BYOL, two layers, DirectPred's views", "byol", TWO_LAYERS, {"augmentation": SIMCLR_CIFAR}),
        ),
        10,
        1.5,
        2,
        settings=TIAN,
    ),
    "E": Experiment(
        "the trained linear predictor aligns with its input's eigenspace (Tian et al., figure 2)",
        "cifar10",
        None,
        16,
        50,
        LINEAR[:1],
        1.0,
        0.13,
        1,
        settings=TIAN,
    ),
    "F": Experiment(
        "linear probe: DirectCLR over SimCLR with a linear projector (62.7 against 61.1 on ImageNet)",
        "cifar10",
        None,
        32,
        20,
        (PROJECTORS[1], Case("DirectCLR", "directclr", {"temperature": 0.5, "d0": 45})),
        4,
        0.2,
        3,
        settings=SIMCLR_ON_CIFAR,
    ),
    "G": Experiment(
        "Barlow Twins needs smaller batches than SimCLR, equal numbers of epochs (Zbontar et al., figure 2)",
        "cifar10",
        None,
        16,
        20,
        _batches(),
        7.5,
        0.7,
        1,
        settings={"augmentation": SIMCLR_CIFAR},
    ),
    "H": Experiment(
        "as G, equal numbers of steps",
        "cifar10",
        None,
        16,
        20,
        _batches(equal_steps=20),
        11,
        0.5,
        1,
        settings={"augmentation": SIMCLR_CIFAR},
    ),
    "I": Experiment(
        "fine-tuned on 1 % or 10 % of the labels, Barlow Twins is on par or better (Zbontar et al., table 2)",
        "fashion",
        20_000,
        16,
        10,
        FEW_LABELS,
        0.75,
        0.08,
        3,
        few_labels=True,
        settings={"batch_size": 128, "learning_rate": 0.2},
    ),
}


def recipe_of(experiment: Experiment, case: Case, seed: int) -> Recipe:
    base = recipe(f"{experiment.data}-{case.method}")
    channels: Any = 1 if experiment.data == "fashion" else 3
    architecture = Architecture(name="resnet18", width=experiment.width, in_channels=channels, stem="3x3/2")
    plain: dict[str, Any] = {"optimizer": "sgd", "schedule": "cosine", "warmup": 0.05, "weight_decay": 1e-4}
    if experiment.data == "fashion":
        plain["augmentation"] = GENTLE
    settings = plain | {"second": None, "clip": None, "bias_lr_scale": 1.0} | experiment.settings | case.settings
    return replace(
        base,
        architecture=architecture,
        options=case.options,
        epochs=case.epochs or experiment.epochs,
        seed=seed,
        **settings,
    )
