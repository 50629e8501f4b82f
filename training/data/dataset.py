"""What every reader returns, and what it raises."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from models.preprocess import Preprocessing


class DataError(ValueError):
    """A data set that is missing or damaged; the message names the file and the remedy."""


class Images(Protocol):
    """Labelled images wherever they lie; `chunks` gives them in order, decoded for an encoder where they are files."""

    def __len__(self) -> int: ...

    def chunks(self, preprocessing: Preprocessing) -> Iterator["ImageSet"]: ...


@dataclass(frozen=True)
class ImageSet:
    """In memory: images (n, channels, height, width) uint8 and labels (n,) int64, -1 for an image without one."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor | slice) -> "ImageSet":
        return ImageSet(self.images[index], self.labels[index])

    def chunks(self, preprocessing: Preprocessing) -> Iterator["ImageSet"]:
        yield self


def verify(path: Path, rows: int, published: dict[str, tuple[int, str]], remedy: str) -> None:
    """Raise DataError when a file of the published number of rows has another MD5 than the published one.

    A file of fewer rows is somebody's subset: there is nothing to compare it with.
    """
    expected_rows, md5 = published.get(path.name, (-1, ""))
    if rows != expected_rows:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    if found != md5:
        raise DataError(f"{path}: its MD5 is {found}, the published one {md5}: damaged or changed; {remedy}")
