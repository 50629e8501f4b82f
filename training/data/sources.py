"""The table of data sets by name."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.preprocess import Preprocessing
from training.data.cifar import read_cifar10, read_cifar100
from training.data.dataset import ImageSet
from training.data.files import FileSet, ShardSet, read_flat, read_folder
from training.data.idx import read_fashion_mnist
from training.data.stl10 import read_stl10

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Source:
    """A data set: its usual folder, its reader, and the statistics with which its encoders normalise.

    unlabelled: name of a split to train on; the labelled training images are then only used for measuring.
    """

    read: Callable[[Path, str], ImageSet | FileSet | ShardSet]
    default: Path
    size: int
    channels: Literal[1, 3]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    licence: str
    redistributable: bool = False
    unlabelled: bool = False
    tested: bool = True
    """Whether there is a test set. Without one, encoders are measured on the held-out images."""
    resize: Literal["stretch", "crop"] = "stretch"

    @property
    def preprocessing(self) -> Preprocessing:
        return self.sized(None)

    def sized(self, size: int | None) -> Preprocessing:
        """The preprocessing for an input of `size` x `size` pixels; None is the set's own size."""
        return Preprocessing(
            size=size or self.size, resize=self.resize, channels=self.channels, mean=self.mean, std=self.std
        )


SOURCES: dict[str, Source] = {
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
    ),
    "cifar100": Source(
        read_cifar100,
        Path("data/cifar-100"),
        32,
        3,
        (0.5071, 0.4865, 0.4409),
        (0.2673, 0.2564, 0.2762),
        "unstated by its authors",
    ),
    "stl10": Source(
        read_stl10,
        Path("data/stl-10"),
        96,
        3,
        (0.4467, 0.4398, 0.4066),
        (0.2603, 0.2566, 0.2713),
        "as ImageNet, from which it was drawn",
        unlabelled=True,
    ),
    "imagenet": Source(
        read_folder,
        Path("data/imagenet"),
        224,
        3,
        IMAGENET_MEAN,
        IMAGENET_STD,
        "non-commercial research only (image-net.org)",
        resize="crop",
    ),
    "folder": Source(
        read_flat,
        Path("data/images"),
        224,
        3,
        IMAGENET_MEAN,
        IMAGENET_STD,
        "unstated: whose images they are is not known",
        tested=False,
        resize="crop",
    ),
}
