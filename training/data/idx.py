"""Reads and writes IDX files, as of MNIST: a magic number, big-endian sizes, then bytes. Plain or gzipped."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.data.dataset import DataError, ImageSet

PREFIX = {"train": "train", "test": "t10k"}
UNSIGNED_BYTE = 0x08
REMEDY = "Debian's package dataset-fashion-mnist has the set, as has github.com/zalandoresearch/fashion-mnist"


def read_fashion_mnist(folder: Path, split: str) -> ImageSet:
    """`split` is "train" (60,000) or "test" (10,000): images (n, 1, 28, 28). Raises DataError."""
    images = read_idx(_find(folder, f"{PREFIX[split]}-images-idx3-ubyte"), dimensions=3)
    labels = read_idx(_find(folder, f"{PREFIX[split]}-labels-idx1-ubyte"), dimensions=1)
    return ImageSet(images.unsqueeze(1), labels.long())


def read_idx(path: Path, dimensions: int) -> Tensor:
    """Read the uint8 array of an IDX file. Raises DataError if it is truncated or not an IDX file."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: truncated or damaged gzip ({error}); fetch it again. {REMEDY}") from error
    header = 4 + 4 * dimensions
    if len(data) < header or data[:4] != bytes([0, 0, UNSIGNED_BYTE, dimensions]):
        raise DataError(f"{path}: not an IDX file of {dimensions} dimensions of bytes")
    shape = [int(n) for n in np.frombuffer(data, ">u4", count=dimensions, offset=4)]
    if len(data) != header + math.prod(shape):
        raise DataError(
            f"{path}: {len(data) - header} bytes where its header promises {math.prod(shape)}: truncated; {REMEDY}"
        )
    return torch.from_numpy(np.frombuffer(data, np.uint8, offset=header).reshape(shape).copy())


def write_idx(path: Path, array: Tensor) -> None:
    """Write a uint8 array as an IDX file, gzipped when the name ends in .gz (with no time stamp: same bytes always)."""
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    data = bytes([0, 0, UNSIGNED_BYTE, array.ndim]) + sizes + array.to(torch.uint8).contiguous().numpy().tobytes()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _find(folder: Path, name: str) -> Path:
    for candidate in (folder / f"{name}.gz", folder / name):
        if candidate.is_file():
            return candidate
    raise DataError(f"{folder / name}[.gz] is missing. {REMEDY}")
