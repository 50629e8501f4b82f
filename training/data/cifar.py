"""CIFAR-10 and CIFAR-100 in both of their published forms, binary and Python (www.cs.toronto.edu/~kriz/cifar.html).

The Python form is a pickle. Ordinary unpickling would run any code in a tampered file. So it is read by an unpickler
that can build only NumPy arrays.
"""

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from training.data.dataset import DataError, ImageSet, verify

PIXELS = 3 * 32 * 32


@dataclass(frozen=True)
class Form:
    """The format of one of the two sets. In a binary row the label is the last of `label_bytes` before the pixels."""

    name: str
    classes: int
    label_bytes: int
    label_key: str
    parts: dict[str, list[str]]
    published: dict[str, tuple[int, str]]
    """Rows and MD5 of the files of the Python form."""

    @property
    def remedy(self) -> str:
        return f"get {self.name}-binary.tar.gz or {self.name}-python.tar.gz from {SITE} and unpack it"


SITE = "www.cs.toronto.edu/~kriz/cifar.html"
CIFAR10 = Form(
    "cifar-10",
    10,
    1,
    "labels",
    {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]},
    {
        "data_batch_1": (10_000, "c99cafc152244af753f735de768cd75f"),
        "data_batch_2": (10_000, "d4bba439e000b95fd0a9bffe97cbabec"),
        "data_batch_3": (10_000, "54ebc095f3ab1f0389bbae665268c751"),
        "data_batch_4": (10_000, "634d18415352ddfa80567beed471001a"),
        "data_batch_5": (10_000, "482c414d41f54cd18b22e5b47cb7c3cb"),
        "test_batch": (10_000, "40351d587109b95175f43aff81a1287e"),
    },
)
CIFAR100 = Form(
    "cifar-100",
    100,
    2,
    "fine_labels",
    {"train": ["train"], "test": ["test"]},
    {
        "train": (50_000, "16019d7e3df5f24257cddd939b257f8d"),
        "test": (10_000, "f0ef6b0ae62326f3e7ffdfab6717acfc"),
    },
)


def read_cifar10(folder: Path, split: str) -> ImageSet:
    """`split` is "train" (50,000) or "test" (10,000): images (n, 3, 32, 32). Raises DataError."""
    return _read(CIFAR10, folder, split)


def read_cifar100(folder: Path, split: str) -> ImageSet:
    """The same with the 100 fine labels. Raises DataError."""
    return _read(CIFAR100, folder, split)


def _read(form: Form, folder: Path, split: str) -> ImageSet:
    parts = [_read_part(form, folder, name) for name in form.parts[split]]
    return ImageSet(torch.cat([part.images for part in parts]), torch.cat([part.labels for part in parts]))


def _read_part(form: Form, folder: Path, name: str) -> ImageSet:
    unpacked = [f"{form.name}-{end}" for end in ("batches-bin", "batches-py", "binary", "python")]
    for root in (folder, *(folder / name for name in unpacked)):
        if (root / f"{name}.bin").is_file():
            return _read_binary(form, root / f"{name}.bin")
        if (root / name).is_file():
            return _read_python(form, root / name)
    raise DataError(f"{folder / name}[.bin] is missing; {form.remedy}")


def _read_binary(form: Form, path: Path) -> ImageSet:
    data = np.fromfile(path, np.uint8)
    row = form.label_bytes + PIXELS
    if len(data) == 0 or len(data) % row:
        raise DataError(f"{path}: {len(data)} bytes is no multiple of {row}: truncated; {form.remedy}")
    rows = torch.from_numpy(data.reshape(-1, row))
    return _image_set(form, path, rows[:, form.label_bytes :], rows[:, form.label_bytes - 1])


def _read_python(form: Form, path: Path) -> ImageSet:
    try:
        batch = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        data, labels = np.asarray(batch["data"], np.uint8), np.asarray(batch[form.label_key], np.int64)
    except Exception as error:  # a damaged pickle may raise any exception
        raise DataError(f"{path}: damaged, or no batch of {form.name} ({error}); {form.remedy}") from error
    if data.ndim != 2 or data.shape[1] != PIXELS:
        raise DataError(f"{path}: data has shape {data.shape}, not (n, {PIXELS})")
    verify(path, len(data), form.published, form.remedy)
    return _image_set(form, path, torch.from_numpy(data.copy()), torch.from_numpy(labels))


def _image_set(form: Form, path: Path, rows: torch.Tensor, labels: torch.Tensor) -> ImageSet:
    labels = labels.long()
    if bool(((labels < 0) | (labels >= form.classes)).any()):
        raise DataError(f"{path}: a label lies outside 0..{form.classes - 1}: damaged; {form.remedy}")
    return ImageSet(rows.reshape(-1, 3, 32, 32), labels)


class _ArrayUnpickler(pickle.Unpickler):
    """An unpickler that knows only the names of pickled NumPy arrays, under their old and new module names."""

    ALLOWED = frozenset({"_reconstruct", "ndarray", "dtype", "encode", "scalar"})
    MODULES = frozenset({"numpy", "numpy.core.multiarray", "numpy._core.multiarray", "_codecs"})

    def find_class(self, module: str, name: str) -> Any:
        if module not in self.MODULES or name not in self.ALLOWED:
            raise pickle.UnpicklingError(f"refused to load {module}.{name}")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)
