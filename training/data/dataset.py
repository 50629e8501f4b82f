"""The types that every reader of a data set returns, and the error that it raises."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from models.preprocess import Preprocessing


class DataError(ValueError):
    """Raised for a data set that is missing or damaged. The message names the file and the remedy."""


class Images(Protocol):
    """Labelled images, in memory or on disk. `chunks` gives them in order; files are decoded for an encoder."""

    def __len__(self) -> int: ...

    def chunks(self, preprocessing: Preprocessing) -> Iterator["ImageSet"]: ...


@dataclass(frozen=True)
class ImageSet:
    """Images in memory: (n, channels, height, width) uint8, and labels (n,) int64, -1 for an image without one."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def of_bytes(self, channels: int) -> bool:
        """Whether the images are as this class says, with so many channels: a plugin's may be anything."""
        return self.images.ndim == 4 and self.images.shape[1] == channels and self.images.dtype == torch.uint8

    def take(self, index: Tensor | slice) -> "ImageSet":
        return ImageSet(self.images[index], self.labels[index])

    def chunks(self, preprocessing: Preprocessing) -> Iterator["ImageSet"]:
        yield self


def verify(path: Path, rows: int, published: dict[str, tuple[int, str]], remedy: str) -> None:
    """Raise DataError if a file has the published number of rows, but not the published MD5.

    A file with fewer rows is a subset that somebody made, and is not checked.
    """
    expected_rows, md5 = published.get(path.name, (-1, ""))
    if rows != expected_rows:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise DataError(f"{path}: its MD5 is {found}, the published one {md5}: damaged or changed; {remedy}")
