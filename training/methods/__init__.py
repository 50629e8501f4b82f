"""One short file a method; each is `forward(views) -> loss` and `step(progress)`."""

from training.methods.base import Method
from training.methods.byol import BYOL
from training.methods.directclr import DirectCLR
from training.methods.simclr import SimCLR

METHODS: dict[str, type[Method]] = {"simclr": SimCLR, "directclr": DirectCLR, "byol": BYOL}

__all__ = ["BYOL", "METHODS", "DirectCLR", "Method", "SimCLR"]
