"""STL-10 in its published binary form (cs.stanford.edu/~acoates/stl10): 96 x 96 images, 100,000 of them unlabelled."""

from pathlib import Path

import numpy as np
import torch

from training.data.dataset import DataError, ImageSet, verify

SIDE = 96
ROW = 3 * SIDE * SIDE
CHUNK = 4096
FILES = {"train": "train", "test": "test", "unlabelled": "unlabeled"}
REMEDY = "get stl10_binary.tar.gz (MD5 91f7769df0f17e558f3565bffb0c7dfb) from cs.stanford.edu/~acoates/stl10, unpack it"
PUBLISHED = {
    "train_X.bin": (5_000, "918c2871b30a85fa023e0c44e0bee87f"),
    "train_y.bin": (5_000, "5a34089d4802c674881badbb80307741"),
    "test_X.bin": (8_000, "7f263ba9f9e0b06b93213547f721ac82"),
    "test_y.bin": (8_000, "36f9794fa4beb8a2c72628de14fa638e"),
    "unlabeled_X.bin": (100_000, "5242ba1fed5e4be9e1e742405eb56ca4"),
}


def read_stl10(folder: Path, split: str) -> ImageSet:
    """`split` is "train" (5,000), "test" (8,000) or "unlabelled" (100,000, labels -1): images (n, 3, 96, 96).

    Raises DataError for a file that is missing, truncated, or of the published size with another MD5.
    """
    name = FILES[split]
    images = _read_images(_find(folder, f"{name}_X.bin"))
    if split == "unlabelled":
        return ImageSet(images, torch.full((len(images),), -1))
    path = _find(folder, f"{name}_y.bin")
    labels = np.fromfile(path, np.uint8).astype(np.int64) - 1  # on disk they run from 1 to 10
    if len(labels) != len(images):
        raise DataError(f"{path}: {len(labels)} labels for {len(images)} images: truncated? {REMEDY}")
    if labels.min() < 0 or labels.max() > 9:
        raise DataError(f"{path}: a label lies outside 1..10: damaged; {REMEDY}")
    verify(path, len(labels), PUBLISHED, REMEDY)
    return ImageSet(images, torch.from_numpy(labels))


def _read_images(path: Path) -> torch.Tensor:
    size = path.stat().st_size
    if size == 0 or size % ROW:
        raise DataError(f"{path}: {size} bytes is no multiple of {ROW}: truncated; {REMEDY}")
    count = size // ROW
    verify(path, count, PUBLISHED, REMEDY)
    images = torch.empty(count, 3, SIDE, SIDE, dtype=torch.uint8)
    data = np.memmap(path, np.uint8, mode="r", shape=(count, 3, SIDE, SIDE))
    for start in range(0, count, CHUNK):  # column-major on disk: the last two axes are x, then y
        images[start : start + CHUNK] = torch.from_numpy(data[start : start + CHUNK].copy()).transpose(2, 3)
    return images


def _find(folder: Path, name: str) -> Path:
    for root in (folder, folder / "stl10_binary"):
        if (root / name).is_file():
            return root / name
    raise DataError(f"{folder / name} is missing; {REMEDY}")
