"""The interface of an engine: pixels (n, c, h, w) uint8 -> rows (n, d) float32. It includes the normalisation."""

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
    """Raised if an engine cannot run this encoder on this device. The message says which engine can."""


class Engine(Protocol):
    """Turns pixels into rows, one call at a time. A row does not depend on the other images of its batch."""

    name: str

    def __call__(self, pixels: Pixels) -> Rows:
        """(n, c, h, w) uint8, n at least 1 -> (n, d) float32, not normalised."""

    def record(self) -> None:
        """Prepare the engine, such as by recording graphs. Called once, before the first request."""


def affine(preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """The normalisation (x * scale - mean) / std as a factor and an offset, each (1, c, 1, 1)."""
    mean, std = (torch.tensor(it, dtype=torch.float64) for it in (preprocessing.mean, preprocessing.std))
    factor, offset = preprocessing.scale / std, -mean / std
    return factor.float().view(1, -1, 1, 1), offset.float().view(1, -1, 1, 1)
