"""ImageNet with ResNet-50 at 224 x 224: the papers' settings. The batches are for many devices under torchrun."""

from typing import Any

from models.artifact import Architecture
from training.augment import BYOL_FIRST, BYOL_SECOND, SIMCLR, SIMSIAM, VICREG
from training.recipes.base import Recipe, of_the_sum

COMMON: dict[str, Any] = {"augmentation": SIMCLR, "held_out": 10_000}
LARGE: dict[str, Any] = {"optimizer": "lars", "weight_decay": 1e-6}
BYOL_VIEWS: dict[str, Any] = {"augmentation": BYOL_FIRST, "second": BYOL_SECOND}


def _imagenet(method: str, options: dict[str, Any], epochs: int, warm: int, **settings: Any) -> Recipe:
    return Recipe(
        name=f"imagenet-{method}",
        data="imagenet",
        method=method,
        architecture=Architecture(name="resnet50", width=64, in_channels=3, stem="7x7"),
        options=options,
        epochs=epochs,
        warmup=warm / epochs,
        **(COMMON | settings),
    )


def simclr() -> Recipe:
    """Chen et al. 2020: rate 0.075 sqrt(batch), temperature 0.1, 10 epochs of warm-up; 64.5 % after 100 epochs."""
    options = {"temperature": 0.1, "hidden": 2048, "projection": 128, "final_norm": True}
    settings = LARGE | of_the_sum(1e-6) | {"batch_size": 4096, "learning_rate": 4.8}
    return _imagenet("simclr", options, 100, 10, **settings)


def directclr() -> Recipe:
    """Jing et al. 2022: d0 360 of 2048, temperature 0.1, cosine to 0.001 of the peak; 62.7 % after 100 epochs."""
    settings = LARGE | {"batch_size": 4096, "learning_rate": 4.8, "final_lr": 0.001}
    return _imagenet("directclr", {"d0": 360, "temperature": 0.1}, 100, 10, **settings)


BYOL: dict[str, Any] = {"batch_size": 4096, "learning_rate": 0.45 * 16} | LARGE | BYOL_VIEWS | of_the_sum(1e-6)


def byol() -> Recipe:
    """Grill et al. 2020, the released preset of 100 epochs: rate 0.45 x 4096/256, tau from 0.99, heads 4096-256."""
    return _imagenet("byol", {"momentum": 0.99, "hidden": 4096, "projection": 256}, 100, 10, **BYOL)


def simsiam() -> Recipe:
    """Chen & He 2021: rate 0.05 x 512/256, constant for the predictor; 68.1 % after 100 epochs."""
    settings = {"batch_size": 512, "learning_rate": 0.1, "weight_decay": 1e-4, "augmentation": SIMSIAM}
    return _imagenet("simsiam", {"layers": 3}, 100, 0, **settings)


DIRECT: dict[str, Any] = {"momentum": 0.99, "constant_momentum": False, "hidden": 4096, "projection": 256}
BYOL_300 = BYOL | {"learning_rate": 0.3 * 16}
"""The preset of 300 epochs."""


def directpred() -> Recipe:
    """BYOL's settings with the closed-form predictor as released (Tian et al. 2021: 72.4 % after 300 epochs).

    Their 64.4 % after 60 epochs are of other settings: SGD at batch 256, on the loss of one direction.
    """
    return _imagenet("directpred", DIRECT | {"variant": "released"}, 300, 10, **BYOL_300)


def directcopy() -> Recipe:
    """BYOL's settings with the copied predictor; the paper's own were not at hand."""
    return _imagenet("directcopy", DIRECT, 300, 10, **BYOL_300)


def barlow_twins() -> Recipe:
    """Zbontar et al. 2021: rate 0.2 x 2048/256 for weights, 0.0048 x 2048/256 for the rest, cosine to 0.001 of the
    peak, heads of 8192; 73.5 %."""
    options = {"projection": 8192, "hidden": 8192, "scale": 1.0}
    settings: dict[str, Any] = {
        "batch_size": 2048,
        "learning_rate": 1.6,
        "bias_lr_scale": 0.0048 / 0.2,
        "final_lr": 0.001,
    }
    settings |= BYOL_VIEWS | LARGE
    return _imagenet("barlow-twins", options, 1000, 10, **settings)


def vicreg() -> Recipe:
    """Bardes et al. 2022: rate 0.2 x 2048/256, cosine to 0.001 of the peak, heads of 8192, one augmentation for both
    views; 73.2 %."""
    options = {"projection": 8192, "hidden": 8192}
    settings = {"batch_size": 2048, "learning_rate": 1.6, "augmentation": VICREG, "final_lr": 0.001} | LARGE
    return _imagenet("vicreg", options, 1000, 10, **settings)


def sigreg() -> Recipe:
    """Balestriero & LeCun 2025, lambda 0.05, AdamW; the paper's ImageNet runs have a ViT, the rate here is ours."""
    settings = {"batch_size": 2048, "optimizer": "adamw", "learning_rate": 2e-3, "weight_decay": 5e-2}
    return _imagenet("sigreg", {"projection": 64, "hidden": 2048, "slices": 1024}, 100, 10, **settings)


RECIPES = (simclr, directclr, byol, simsiam, directpred, directcopy, barlow_twins, vicreg, sigreg)
