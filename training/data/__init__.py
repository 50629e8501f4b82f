"""Image sets in their published on-disk formats, read whole into memory as uint8 tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.data.cifar import read_cifar10
from training.data.dataset import DataError, ImageSet
from training.data.idx import read_fashion_mnist

SAMPLE = Path(__file__).parent / "fashion-sample"
"""About 2,000 Fashion-MNIST images in the IDX format, in the repository for tests and demonstrations."""


@dataclass(frozen=True)
class Source:
    """A data set by name: where it usually lies, how it is read, and the statistics its encoders normalise with."""

    read: Callable[[Path, str], ImageSet]
    default: Path
    size: int
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    redistributable: bool


SOURCES = {
    "fashion": Source(
        read_fashion_mnist, Path("/usr/share/datasets/fashion-mnist"), 28, 1, (0.286,), (0.353,), "MIT", True
    ),
    "cifar10": Source(
        read_cifar10,
        Path("data/cifar-10"),
        32,
        3,
        (0.4914, 0.4822, 0.4465),
        (0.2470, 0.2435, 0.2616),
        "unstated by its authors",
        False,
    ),
}

__all__ = ["SAMPLE", "SOURCES", "DataError", "ImageSet", "Source", "read_cifar10", "read_fashion_mnist"]
