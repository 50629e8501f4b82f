"""Fashion-MNIST on a CPU core: ours, for minutes rather than days; no paper trained on it."""

from dataclasses import replace
from typing import Any

from models.artifact import Architecture
from training.augment import Augmentation
from training.recipes.base import Recipe

GENTLE = Augmentation(crop=(0.4, 1.0), ratio=(4 / 5, 5 / 4))
HARD = replace(GENTLE, crop=(0.2, 1.0), jitter=1.0, brightness=0.8, contrast=0.8, blur=0.5, sigma=(0.1, 1.0))
"""For runs of hours, in which GENTLE views become too easy to tell apart. docs/measured/encoders.md has the search."""


def _fashion(method: str, options: dict[str, Any], **settings: Any) -> Recipe:
    return Recipe(
        name=f"fashion-{method}",
        data="fashion",
        method=method,
        architecture=Architecture(name="resnet18", width=32, in_channels=1, stem="3x3/2"),
        options=options,
        **({"augmentation": GENTLE} | settings),
    )


def simclr() -> Recipe:
    """Ours."""
    return _fashion("simclr", {"temperature": 0.2, "hidden": 512})


def directclr() -> Recipe:
    """Ours; d0 is 64 of 256 (the paper's 360 of 2048 scales to 45, its figure 12 is flat in between)."""
    return _fashion("directclr", {"d0": 64, "temperature": 0.1}, augmentation=HARD)


def byol() -> Recipe:
    """Ours."""
    return _fashion("byol", {"momentum": 0.99}, augmentation=HARD)


def simsiam() -> Recipe:
    """Ours; the paper's ratios of widths and its constant rate of the predictor."""
    options = {"projection": 512, "bottleneck": 128, "layers": 2}
    return _fashion("simsiam", options, learning_rate=0.1, weight_decay=5e-4)


def directpred() -> Recipe:
    """Ours; rho and epsilon of the paper."""
    return _fashion("directpred", {"momentum": 0.99}, weight_decay=4e-4)


def directcopy() -> Recipe:
    """Ours; rho and epsilon of DirectPred."""
    return _fashion("directcopy", {"momentum": 0.99}, weight_decay=4e-4)


def barlow_twins() -> Recipe:
    """Ours; heads of 512, the loss scaled so that SGD takes the rate of the others."""
    return _fashion("barlow-twins", {"projection": 512, "hidden": 512, "scale": 0.02})


def vicreg() -> Recipe:
    """Ours; heads of 512, the weights in the paper's ratio of 25 : 25 : 1."""
    options = {"projection": 512, "hidden": 512, "invariance": 1.0, "variance": 1.0, "covariance": 0.04}
    return _fashion("vicreg", options)


def sigreg() -> Recipe:
    """Ours; lambda of the paper."""
    return _fashion("sigreg", {"projection": 64, "hidden": 512})


RECIPES = (simclr, directclr, byol, simsiam, directpred, directcopy, barlow_twins, vicreg, sigreg)
