"""The embedder turns pixels, arrays or image files into rows. Evaluation, references and offline embedding use it."""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from models.artifact import Artifact
from models.decode import MAX_PIXELS, ImageError
from models.engines import Name, start
from models.preprocess import Pixels, decode, prepare_arrays

MOST_BATCH = 256
ONNX_PIXELS = 1 << 18  # of all images in a pass of onnxruntime, for each thread
PASS_PIXELS = 1 << 20  # of all images in a pass on a CPU


def normalize(rows: Tensor) -> Tensor:
    """Scale rows (n, d) to unit L2 norm. An all-zero row stays zero.

    Computed in float64, as in the monitor: squares of finite float32 values can overflow or underflow in float32.
    """
    wide = rows.double()
    lengths = torch.linalg.vector_norm(wide, dim=1, keepdim=True)
    unit: Tensor = wide / lengths.clamp_min(torch.finfo(torch.float64).tiny)
    return unit.to(rows.dtype)


def least_cosine(rows: Tensor | NDArray[np.floating], expected: Tensor | NDArray[np.floating]) -> float:
    """The least cosine between rows (n, d) and the expected rows; -1 if any row is not finite or is all zero."""
    unit, wanted = (normalize(torch.from_numpy(np.asarray(it, np.float64))) for it in (rows, expected))
    return float((unit * wanted).sum(1).nan_to_num(nan=-1.0).min())


def faulty(rows: Tensor) -> Tensor:
    """A mask (n,) of the rows (n, d) that are no embedding: not finite, or all zero."""
    return ~(rows.isfinite().all(dim=1) & rows.any(dim=1))


def _usual_batch(size: int, device: torch.device) -> int:
    """Images in one forward pass, if nobody says how many.

    Activations grow with the pixels of a batch. On a CPU, those of 256 images of 224 x 224 pixels take gigabytes and
    leave its caches: the pass is then slower than that of 20.
    """
    return MOST_BATCH if device.type != "cpu" else max(1, min(MOST_BATCH, PASS_PIXELS // size**2))


def _onnx_batch(size: int, threads: int | None) -> int:
    """Images in one pass of onnxruntime at most, whose activations then stay in the caches of its threads.

    CPU milliseconds of an image of 224 x 224 pixels, one thread, in passes of 4 and of 16 to 20: EfficientNet-Lite0 8.1
    and 9.7, ViT-Tiny/16 20.7 and 27.2, ResNet-50 47.2 and 47.2, ResNet-18 22.1 and 21.1. PyTorch gains from more.
    """
    return max(1, ONNX_PIXELS * (threads or torch.get_num_threads()) // size**2)


class Embedder:
    """An encoder ready to run: (n, channels, size, size) uint8 -> (n, d) float32 representations on the CPU."""

    def __init__(
        self,
        artifact: Artifact,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_batch: int | None = None,
        engine: Name = "auto",
        threads: int | None = None,
    ) -> None:
        """Start an engine. Arguments and errors are those of engines.start.

        max_batch: images in one forward pass; None is 256 of CIFAR's size, and fewer of larger ones on a CPU.
            onnxruntime takes fewer of large images still: see _onnx_batch.
        """
        self.card = artifact.card
        self.dimension = artifact.card.dimension
        self.device = torch.device(device)
        self.dtype = dtype
        self.max_batch = max_batch or _usual_batch(artifact.card.preprocessing.size, self.device)
        self.engine = start(artifact, engine, self.device, dtype, self.max_batch, threads)
        if self.engine.name == "onnx":
            self.max_batch = min(self.max_batch, _onnx_batch(artifact.card.preprocessing.size, threads))

    @property
    def runs_in(self) -> str:
        """What runs it, in words: its engine, the precision and the device."""
        return f"the {self.engine.name} engine, {str(self.dtype).removeprefix('torch.')} on {self.device}"

    def embed(self, pixels: Tensor | Pixels) -> Tensor:
        """(n, channels, size, size) uint8 -> (n, d) float32, not normalised. Raises ValueError for another shape."""
        images = pixels if isinstance(pixels, np.ndarray) else pixels.numpy()
        size = self.card.preprocessing.size
        wanted = (self.card.preprocessing.channels, size, size)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != wanted:
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"pixels are {images.dtype} {images.shape}; this encoder takes uint8 (n, {shape})")
        rows = [self.engine(images[at : at + self.max_batch]) for at in range(0, len(images), self.max_batch)]
        if not rows:
            return torch.empty(0, self.dimension)
        return torch.from_numpy(rows[0] if len(rows) == 1 else np.concatenate(rows))

    def embed_arrays(self, images: Tensor) -> Tensor:
        """(n, c, h, w) uint8 images of any size -> (n, d) float32, resized exactly as a file of each would be."""
        return self.embed(prepare_arrays(images, self.card.preprocessing))

    def embed_files(self, paths: Iterable[str | os.PathLike[str]], max_pixels: int = MAX_PIXELS) -> Tensor:
        """Image files -> (n, d) float32. Raises ImageError, naming the file, or OSError if it cannot be read."""
        prepared = []
        for path in paths:
            data = Path(path).read_bytes()
            try:
                prepared.append(decode(data, self.card.preprocessing, max_pixels=max_pixels))
            except ImageError as error:
                raise ImageError(error.code, f"{os.fspath(path)}: {error}") from error
        return self.embed(np.stack(prepared)) if prepared else torch.empty(0, self.dimension)

    def warm_up(self, batch_sizes: Iterable[int] = (1,)) -> None:
        """Run each batch size once, so that the first request does not pay for it; on CUDA, record graphs first."""
        size, channels = self.card.preprocessing.size, self.card.preprocessing.channels
        self.engine.record()
        for n in batch_sizes:
            self.embed(np.zeros((n, channels, size, size), np.uint8))
