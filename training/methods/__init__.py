"""One short file a method; each is `forward(views) -> loss` and `step(progress)`."""

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
]
