"""CIFAR-10 in both of its published forms, binary and Python (www.cs.toronto.edu/~kriz/cifar.html).

The Python form is a pickle. It is read by an unpickler that can build nothing but the arrays it is made of, because an
ordinary one would run whatever code a tampered file holds.
"""

import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.dataset import DataError, ImageSet

ROW = 1 + 3 * 32 * 32
BATCHES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
REMEDY = "get cifar-10-binary.tar.gz or cifar-10-python.tar.gz from www.cs.toronto.edu/~kriz/cifar.html and unpack it"


def read_cifar10(folder: Path, split: str) -> ImageSet:
    """`split` is "train" (50,000) or "test" (10,000): images (n, 3, 32, 32). Raises DataError."""
    parts = [_read_batch(folder, name) for name in BATCHES[split]]
    return ImageSet(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def _read_batch(folder: Path, name: str) -> ImageSet:
    for root in (folder, folder / "cifar-10-batches-bin", folder / "cifar-10-batches-py"):
        if (root / f"{name}.bin").is_file():
            return _read_binary(root / f"{name}.bin")
        if (root / name).is_file():
            return _read_python(root / name)
    raise DataError(f"{folder / name}[.bin] is missing; {REMEDY}")


def _read_binary(path: Path) -> ImageSet:
    data = np.fromfile(path, np.uint8)
    if len(data) == 0 or len(data) % ROW:
        raise DataError(f"{path}: {len(data)} bytes is no multiple of {ROW}: truncated; {REMEDY}")
    rows = torch.from_numpy(data.reshape(-1, ROW))
    return _image_set(path, rows[:, 1:], rows[:, 0])


def _read_python(path: Path) -> ImageSet:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        data, labels = np.asarray(batch["data"], np.uint8), np.asarray(batch["labels"], np.int64)
    except Exception as error:  # a damaged pickle fails in whatever way its bytes suggest
        raise DataError(f"{path}: damaged, or no CIFAR-10 batch ({error}); {REMEDY}") from error
    if data.ndim != 2 or data.shape[1] != ROW - 1:
        raise DataError(f"{path}: data has shape {data.shape}, not (n, {ROW - 1})")
    return _image_set(path, torch.from_numpy(data.copy()), torch.from_numpy(labels))


def _image_set(path: Path, rows: torch.Tensor, labels: torch.Tensor) -> ImageSet:
    labels = labels.long()
    if int(labels.min()) < 0 or int(labels.max()) > 9:
        raise DataError(f"{path}: a label lies outside 0..9: damaged; {REMEDY}")
    return ImageSet(rows.reshape(-1, 3, 32, 32), labels)


class _ArrayUnpickler(pickle.Unpickler):
    """Knows the few names a NumPy array is pickled with, under their old and new module names, and no others."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode", "scalar"})
    MODULES = frozenset({"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs"})

    def find_class(self, module: str, name: str) -> Any:
        if module not in self.MODULES or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
