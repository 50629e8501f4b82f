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
    """(1, c, 1, 1) scale and offset of pixels: (x / 255 - mean) / std = x * scale + offset."""
    mean, std = torch.tensor(preprocessing.mean), torch.tensor(preprocessing.std)
    return (1 / (255 * std)).view(1, -1, 1, 1), (-mean / std).view(1, -1, 1, 1)
