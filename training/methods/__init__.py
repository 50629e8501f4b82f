"""Self-supervised methods, one short file each. A method is `forward(views) -> loss` and `step(progress)`."""

from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from training.methods.barlow_twins import BarlowTwins
from training.methods.base import Encoder, Method, ParameterGroup
from training.methods.byol import BYOL
from training.methods.directclr import DirectCLR
from training.methods.directcopy import DirectCopy
from training.methods.directpred import DirectPred
from training.methods.sigreg import SIGReg
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
    "sigreg": SIGReg,
}


def options_class(method: type[Method]) -> type[Any]:
    """The dataclass of options that a method's constructor takes."""
    found: type[Any] = get_type_hints(method.__init__)["options"]
    return found


def options_of(method: type[Method]) -> dict[str, Any]:
    """The options of a method by name, with their types."""
    return get_type_hints(options_class(method))


def build(name: str, encoder: Encoder, options: dict[str, Any]) -> Method:
    """Build the method `name` around `encoder`. Raises ValueError, naming it, for an unknown option or a bad value."""
    method = METHODS[name]
    known = options_of(method)
    for option, value in options.items():
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it takes {', '.join(sorted(known))}")
        try:
            TypeAdapter(known[option], config=ConfigDict(strict=True)).validate_python(value)
        except ValidationError as error:
            raise ValueError(f"{option} is {value!r}: {error.errors()[0]['msg']}") from error
        if (
            type(value) is int
            and int in (known[option], *getattr(known[option], "__args__", ()))
            and not 1 <= value < 2**31
        ):
            raise ValueError(f"{option} is {value}; it must be at least 1 and below 2^31")
    return method(encoder, options_class(method)(**options))


__all__ = [
    "BYOL",
    "METHODS",
    "BarlowTwins",
    "DirectCLR",
    "DirectCopy",
    "DirectPred",
    "Method",
    "ParameterGroup",
    "SIGReg",
    "SimCLR",
    "SimSiam",
    "VICReg",
    "build",
    "options_class",
    "options_of",
]
