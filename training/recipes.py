"""Recipes: Python functions that return a dataclass, named DATA-METHOD. Flags override fields."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from models.artifact import Architecture
from training.augment import Augmentation


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run. `options` go to the method's constructor."""

    name: str
    data: str
    method: str
    architecture: Architecture
    augmentation: Augmentation
    options: dict[str, Any] = field(default_factory=dict)
    epochs: int = 10
    batch_size: int = 128
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: float = 0.2
    weight_decay: float = 1e-4
    warmup: float = 0.05
    """Share of the run over which the learning rate rises linearly; it falls as a cosine afterwards."""
    held_out: int = 10_000
    """Training images kept from the gradient: they choose, and they carry the reference's held-out split."""
    seed: int = 0


def _fashion(method: str, **options: Any) -> Recipe:
    """Fashion-MNIST garments differ in outline, so crops are gentler than the 0.08 that suits photographs."""
    return Recipe(
        name=f"fashion-{method}",
        data="fashion",
        method=method,
        architecture=Architecture(name="resnet18", width=32, in_channels=1, stem="3x3/2"),
        augmentation=Augmentation(crop=(0.4, 1.0), ratio=(4 / 5, 5 / 4)),
        options=options,
    )


def fashion_simclr() -> Recipe:
    return _fashion("simclr", temperature=0.2)


def fashion_directclr() -> Recipe:
    """d0 is 64 of 256; the paper's 360 of 2048 scales to 45, its figure 12 is flat in between."""
    return _fashion("directclr", d0=64, temperature=0.1)


def fashion_byol() -> Recipe:
    return _fashion("byol", momentum=0.99)


def _cifar10(method: str, **options: Any) -> Recipe:
    """Without the saturation, hue and greyscale changes of the papers' recipes: expect less than their tables."""
    return Recipe(
        name=f"cifar10-{method}",
        data="cifar10",
        method=method,
        architecture=Architecture(name="resnet18", width=64, in_channels=3, stem="3x3"),
        augmentation=Augmentation(crop=(0.2, 1.0)),
        options=options,
        epochs=200,
        batch_size=512,
    )


def cifar10_simclr() -> Recipe:
    return _cifar10("simclr", temperature=0.5)


def cifar10_directclr() -> Recipe:
    return _cifar10("directclr", d0=90, temperature=0.1)


def cifar10_byol() -> Recipe:
    return _cifar10("byol", momentum=0.99)


RECIPES: dict[str, Callable[[], Recipe]] = {
    function.__name__.replace("_", "-"): function
    for function in (fashion_simclr, fashion_directclr, fashion_byol, cifar10_simclr, cifar10_directclr, cifar10_byol)
}


def recipe(name: str) -> Recipe:
    """The recipe of that name. ValueError, with the nearest names, for another."""
    if name not in RECIPES:
        near = difflib.get_close_matches(name, RECIPES, n=3, cutoff=0.3) or list(RECIPES)
        raise ValueError(f"there is no recipe {name!r}; did you mean {', '.join(near)}?")
    return RECIPES[name]()
