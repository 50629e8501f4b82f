"""STL-10's 100,000 unlabelled images at 96 x 96 with ResNet-18; its 5,000 labelled ones only measure.

Of these papers only DirectPred's trained on it. The others' settings are our choice: those of CIFAR-10 for 500 epochs,
with the blur that images of this size have room for, and ImageNet's stem.
"""

from collections.abc import Callable
from dataclasses import replace

from models.artifact import Architecture
from training.recipes import cifar
from training.recipes.base import Recipe


def _stl10(ten: Callable[[], Recipe], epochs: int) -> Recipe:
    chosen = ten()
    first, second = chosen.augmentation, chosen.second
    return replace(
        chosen,
        name=f"stl10-{chosen.method}",
        data="stl10",
        architecture=Architecture(name="resnet18", width=64, in_channels=3, stem="7x7"),
        augmentation=replace(first, blur=1.0 if second else 0.5),
        second=replace(second, blur=0.1) if second else None,
        epochs=epochs,
        held_out=1_000,
    )


def simclr() -> Recipe:
    """As cifar10-simclr, with blur."""
    return _stl10(cifar.simclr, 500)


def directclr() -> Recipe:
    """As cifar10-directclr, with blur."""
    return _stl10(cifar.directclr, 500)


def byol() -> Recipe:
    """As cifar10-byol, with blur."""
    return _stl10(cifar.byol, 500)


def simsiam() -> Recipe:
    """As cifar10-simsiam, with blur."""
    return _stl10(cifar.simsiam, 500)


def directpred() -> Recipe:
    """Tian et al. 2021, appendix: tau and learning rate constant; 77.9 % after 100 epochs. The augmentation is ours."""
    return _stl10(cifar.directpred, 100)


def directcopy() -> Recipe:
    """DirectPred's settings; the paper's own were not at hand."""
    return _stl10(cifar.directcopy, 100)


def barlow_twins() -> Recipe:
    """As cifar10-barlow-twins, with blur."""
    return _stl10(cifar.barlow_twins, 500)


def vicreg() -> Recipe:
    """As cifar10-vicreg, with blur."""
    return _stl10(cifar.vicreg, 500)


def sigreg() -> Recipe:
    """As cifar10-sigreg, with blur."""
    return _stl10(cifar.sigreg, 500)


RECIPES = (simclr, directclr, byol, simsiam, directpred, directcopy, barlow_twins, vicreg, sigreg)
