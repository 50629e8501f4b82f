"""One short file a method; each is `forward(views) -> loss` and `step(progress)`."""

from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import nn

from models.backbones.resnet import ResNet
from training.methods.barlow_twins import BarlowTwins
from training.methods.base import Method, ParameterGroup
from training.methods.byol import BYOL
from training.methods.directclr import DirectCLR
from training.methods.directcopy import DirectCopy
from training.methods.directpred import DirectPred
from training.methods.simclr import SimCLR
from training.methods.simsiam import SimSiam
from training.methods.vicreg import VICReg

METHODS: dict[str, type[Method]] = {
    "simclr": SimCLR,
    "directclr": DirectCLR,
    "byol": BYOL,
    "simsiam": SimSiam,
    "directpred": DirectPred,
    "directcopy": DirectCopy,
    "barlow-twins": BarlowTwins,
    "vicreg": VICReg,
}
NOT_OPTIONS = {"return", "encoder", "options", "switches"}


def options_of(method: type[Method]) -> dict[str, Any]:
    """The options a method's constructor takes, those of its bases included, by name, with their types."""
    found: dict[str, Any] = {}
    for base in reversed(method.__mro__):
        if issubclass(base, Method) and "__init__" in vars(base):
            found |= get_type_hints(base.__init__)
    return {
        name: kind
        for name, kind in found.items()
        if name not in NOT_OPTIONS and not (isinstance(kind, type) and issubclass(kind, nn.Module))
    }


def build(name: str, encoder: ResNet, options: dict[str, Any]) -> Method:
    """The method of that name around `encoder`. ValueError naming an option it does not take, or a value it cannot."""
    known = options_of(METHODS[name])
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it takes {', '.join(sorted(known))}")
        try:
            TypeAdapter(known[option], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{option} is {value!r}: {error.errors()[0]['msg']}") from error
        if type(value) is int and int in (known[option], *getattr(known[option], "__args__", ())) and value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    return METHODS[name](encoder, **options)


__all__ = [
    "BYOL",
    "METHODS",
    "BarlowTwins",
    "DirectCLR",
    "DirectCopy",
    "DirectPred",
    "Method",
    "ParameterGroup",
    "SimCLR",
    "SimSiam",
    "VICReg",
    "build",
    "options_of",
]
