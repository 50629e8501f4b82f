"""An encoder ready to run: pixels, arrays or files to rows, the only path for evaluation, reference and service."""

import os
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from models.artifact import Artifact
from models.decode import MAX_PIXELS, ImageError
from models.inference import Graphs, buckets, folded
from models.preprocess import Pixels, decode, prepare_arrays


def normalize(rows: Tensor) -> Tensor:
    """(n, d) -> rows of unit L2 norm; an all-zero row stays zero."""
    lengths: Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return rows / lengths.clamp_min(1e-12)


class Embedder:
    """An encoder ready to run: (n, channels, size, size) uint8 -> (n, d) float32 representations on the CPU."""

    def __init__(
        self,
        artifact: Artifact,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        max_batch: int = 256,
    ) -> None:
        self.card = artifact.card
        self.dimension = artifact.card.dimension
        self.device, self.dtype, self.max_batch = torch.device(device), dtype, max_batch
        self._encoder = folded(artifact.encoder).to(self.device, dtype)
        self._graphs: Graphs | None = None
        shape = (1, -1, 1, 1)
        mean, std = torch.tensor(self.card.preprocessing.mean), torch.tensor(self.card.preprocessing.std)
        self._scale = (1 / (255 * std)).view(shape).to(self.device)
        self._offset = (-mean / std).view(shape).to(self.device)

    @torch.inference_mode()
    def embed(self, pixels: Tensor | Pixels) -> Tensor:
        """(n, channels, size, size) uint8 -> (n, d) float32, not normalised. ValueError for another shape or dtype."""
        images = torch.from_numpy(pixels) if isinstance(pixels, np.ndarray) else pixels
        size = self.card.preprocessing.size
        wanted = (self.card.preprocessing.channels, size, size)
        if images.dtype != torch.uint8 or images.ndim != 4 or tuple(images.shape[1:]) != wanted:
            shape = ", ".join(map(str, wanted))
            raise ValueError(f"pixels are {images.dtype} {tuple(images.shape)}; this encoder takes uint8 (n, {shape})")
        batches = [self._forward(batch) for batch in torch.split(images, self.max_batch)] if len(images) else []
        return torch.cat(batches) if batches else torch.empty(0, self.dimension)

    def _forward(self, batch: Tensor) -> Tensor:
        rows = self._pass(batch.to(self.device, non_blocking=True)) if self._graphs is None else self._graphs(batch)
        return rows.float().cpu()

    def _pass(self, batch: Tensor) -> Tensor:
        x = batch.to(torch.float32, memory_format=torch.channels_last).mul_(self._scale).add_(self._offset)
        # cuDNN would round float32 convolutions to TF32: noise above the floor that float32 references allow for.
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if x.is_cuda else nullcontext()
        with exact:
            rows: Tensor = self._encoder(x.to(self.dtype))
        return rows

    def embed_arrays(self, images: Tensor) -> Tensor:
        """(n, c, h, w) uint8 images of any size -> (n, d) float32, resized exactly as a file of each would be."""
        return self.embed(prepare_arrays(images, self.card.preprocessing))

    def embed_files(self, paths: Iterable[str | os.PathLike[str]], max_pixels: int = MAX_PIXELS) -> Tensor:
        """Image files -> (n, d) float32. Raises ImageError naming the file, OSError when it cannot be read."""
        prepared = []
        for path in paths:
            data = Path(path).read_bytes()
            try:
                prepared.append(decode(data, self.card.preprocessing, max_pixels=max_pixels))
            except ImageError as error:
                raise ImageError(error.code, f"{os.fspath(path)}: {error}") from error
        return self.embed(np.stack(prepared)) if prepared else torch.empty(0, self.dimension)

    @torch.inference_mode()
    def warm_up(self, batch_sizes: Iterable[int] = (1,)) -> None:
        """Run each batch size once, so that the first request does not pay for kernel selection.

        On CUDA, record a graph for every bucket up to max_batch; from then on all passes are theirs.
        """
        size, channels = self.card.preprocessing.size, self.card.preprocessing.channels
        if self.device.type == "cuda" and self._graphs is None:
            self._graphs = Graphs(self._pass, (channels, size, size), buckets(self.max_batch), self.device)
        for n in batch_sizes:
            self.embed(torch.zeros(n, channels, size, size, dtype=torch.uint8))
