"""CIFAR-10 with ResNet-18, 3x3 stem: the papers' settings where they have any, solo-learn's (MIT) where they have none.

solo-learn's table after 1000 epochs (linear probe, trained online): Barlow Twins 92.1, BYOL 92.6, SimCLR 90.7, SimSiam
90.5, VICReg 92.1. Its BYOL, Barlow Twins and VICReg are in scripts/pretrain/cifar/*.yaml, with LARS' coefficient and
clipping.
"""

from dataclasses import replace
from typing import Any

from models.artifact import Architecture
from training.augment import BYOL_FIRST, BYOL_SECOND, SIMCLR_CIFAR, SIMSIAM_CIFAR, VICREG
from training.recipes.base import Recipe, of_the_sum

BYOL_VIEWS: dict[str, Any] = {
    "augmentation": replace(BYOL_FIRST, blur=0.0),
    "second": replace(BYOL_SECOND, blur=0.0),
}
COMMON: dict[str, Any] = {"augmentation": SIMCLR_CIFAR, "held_out": 5_000, "warmup": 0.01}
SOLO: dict[str, Any] = {"epochs": 1000, "batch_size": 256, "optimizer": "lars", "trust": 0.02, "trust_clip": True}


def _cifar10(method: str, options: dict[str, Any], **settings: Any) -> Recipe:
    return Recipe(
        name=f"cifar10-{method}",
        data="cifar10",
        method=method,
        architecture=Architecture(name="resnet18", width=64, in_channels=3, stem="3x3"),
        options=options,
        **(COMMON | settings),
    )


CONTRASTIVE: dict[str, Any] = {"epochs": 1000, "batch_size": 512, "optimizer": "lars", "learning_rate": 1.0 * 512 / 256}
"""SimCLR's rate of 1.0 is for a batch of 256, and is scaled linearly."""


def simclr() -> Recipe:
    """Chen et al. 2020, B.9: rate 1.0 x 512/256, temperature 0.5, no blur, half the jitter; about 91 %."""
    return _cifar10("simclr", {"temperature": 0.5, "final_norm": True}, **CONTRASTIVE, **of_the_sum(1e-4))


def directclr() -> Recipe:
    """No published run on CIFAR; SimCLR's settings with the paper's temperature and its share of d0, 90 of 512."""
    return _cifar10("directclr", {"d0": 90, "temperature": 0.1}, **CONTRASTIVE)


def byol() -> Recipe:
    """solo-learn: heads 4096-256, tau from 0.99 to 1; 92.6 %."""
    options = {"hidden": 4096, "projection": 256, "momentum": 0.99}
    return _cifar10("byol", options, **SOLO, **BYOL_VIEWS, learning_rate=1.0, **of_the_sum(1e-5))


def simsiam() -> Recipe:
    """Chen & He 2021, appendix D: base rate 0.03 x 512/256, two layers in the projector, crops from 0.2, no blur."""
    settings = {"epochs": 800, "batch_size": 512, "learning_rate": 0.06, "weight_decay": 5e-4, "warmup": 0.0}
    return _cifar10("simsiam", {"layers": 2}, augmentation=SIMSIAM_CIFAR, **settings)


DIRECT: dict[str, Any] = {
    "epochs": 100,
    "batch_size": 128,
    "learning_rate": 2 * 0.03,
    "weight_decay": 4e-4 / 2,
    "schedule": "constant",
    "warmup": 0.0,
}
"""Published: 0.03 and 4e-4 on the sum of the two directions' losses. Ours is their mean, so that twice the rate and
half the decay make the same steps. Biases and BatchNorm are not decayed here."""


def directpred() -> Recipe:
    """Tian et al. 2021, appendix: tau and learning rate constant; 85.2 % after 100 epochs. The augmentation is ours.

    The formula is that of the authors' release: with the paper's, and its epsilon, runs at this rate collapsed
    (docs/measured/methods.md, D).
    """
    return _cifar10("directpred", {"momentum": 0.996, "variant": "released"}, **DIRECT)


def directcopy() -> Recipe:
    """DirectPred's settings; the paper's own for CIFAR-10 were not at hand."""
    return _cifar10("directcopy", {"momentum": 0.996}, **DIRECT)


def barlow_twins() -> Recipe:
    """solo-learn: heads of 2048, the loss times 0.1; 92.1 %."""
    options = {"projection": 2048, "hidden": 2048, "scale": 0.1}
    return _cifar10("barlow-twins", options, **SOLO, **BYOL_VIEWS, learning_rate=0.3)


def vicreg() -> Recipe:
    """solo-learn: heads of 2048, both views alike, crops from 0.2; 92.1 %."""
    options = {"projection": 2048, "hidden": 2048}
    views = replace(VICREG, crop=(0.2, 1.0), blur=0.0)
    return _cifar10("vicreg", options, **SOLO, augmentation=views, learning_rate=0.3)


def sigreg() -> Recipe:
    """Balestriero & LeCun 2025: lambda 0.05, AdamW. No run with ResNet-18 was published, and the rate is ours."""
    settings = {"epochs": 800, "batch_size": 256, "optimizer": "adamw", "learning_rate": 1e-3, "weight_decay": 5e-2}
    return _cifar10("sigreg", {"projection": 64, "hidden": 2048}, **settings)


RECIPES = (simclr, directclr, byol, simsiam, directpred, directcopy, barlow_twins, vicreg, sigreg)
