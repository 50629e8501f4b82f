"""What an engine is: pixels (n, c, h, w) uint8 -> rows (n, d) float32, normalised by mean and std inside."""

from typing import Literal, Protocol, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.artifact import ArtifactError
from models.preprocess import Preprocessing

Name = Literal["auto", "onnx", "torch"]
NAMES: tuple[Name, ...] = get_args(Name)
Pixels = NDArray[np.uint8]
Rows = NDArray[np.float32]


class EngineError(ArtifactError):
    """An engine that cannot run this encoder, or not there; the message says which one can."""


class Engine(Protocol):
    """Turns pixels into rows, one call at a time. A row does not depend on the others of its batch."""

    name: str

    def __call__(self, pixels: Pixels) -> Rows:
        """(n, c, h, w) uint8, n at least 1 -> (n, d) float32, not normalised."""

    def record(self) -> None:
        """Prepare what is worth preparing once, if anything is: called before the first request."""


def affine(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """(1, c, 1, 1) factor and offset of pixels, with the card's scale, mean and std: (x * scale - mean) / std."""
    mean, std = (torch.tensor(it, dtype=torch.float64) for it in (preprocessing.mean, preprocessing.std))
    factor, offset = preprocessing.scale / std, -mean / std
    return factor.float().view(1, -1, 1, 1), offset.float().view(1, -1, 1, 1)
