"""What every reader returns, and what it raises."""

from dataclasses import dataclass

from torch import Tensor


class DataError(ValueError):
    """A data set that is missing or damaged; the message names the file and the remedy."""


@dataclass(frozen=True)
class ImageSet:
    """images (n, channels, height, width) uint8 and labels (n,) int64."""

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise DataError(f"{len(self.images)} images but {len(self.labels)} labels")

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor | slice) -> "ImageSet":
        return ImageSet(self.images[index], self.labels[index])
