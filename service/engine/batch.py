"""A batch of decoded images, and what the engine asks of an encoder."""

import time
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from models.embedder import faulty, normalize
from service.engine.pool import SlowImage
from service.engine.queue import Part, Pixels, Rows


class Encoder(Protocol):
    """What an encoder must provide for the engine."""

    def decode(self, image: Any) -> Pixels | SlowImage:
        """Decode an image of a request to (c, s, s) uint8. An exception fails this request and no other.

        It must return within about 20 ms. For an image that may take longer it returns a SlowImage.
        """

    def embed(self, pixels: Pixels) -> Rows:
        """(n, c, s, s) uint8 -> (n, d) float32, not normalised."""

    def on_embedded(self, pixels: Pixels, rows: Rows, clients: NDArray[np.int64]) -> None:
        """Called once the rows are on their way to their clients, (n,) numbers. It must return at once."""


class Batch:
    """Decoded parts of requests in one buffer that the device can copy from."""

    def __init__(self, capacity: int, *, pinned: bool) -> None:
        self._capacity = capacity
        self._pinned = pinned
        self._buffer: Pixels | None = None
        self.parts: list[Part] = []
        self.size = 0

    def add(self, part: Part, images: Sequence[Pixels]) -> None:
        """Add a part's images, (c, s, s) each."""
        if self._buffer is None:
            shape = (self._capacity, *images[0].shape)
            # From page-locked memory a CUDA device can copy while this thread does something else.
            own = torch.empty(shape, dtype=torch.uint8, pin_memory=True).numpy() if self._pinned else None
            self._buffer = np.empty(shape, np.uint8) if own is None else own
        self.parts.append(part)
        for image in images:
            self._buffer[self.size] = image
            self.size += 1

    def pixels(self) -> Pixels:
        """(n, c, s, s) uint8 pixels of the parts still wanted. The others are dropped, so n may be 0."""
        assert self._buffer is not None
        pixels = self._buffer[: self.size]
        now = time.monotonic()
        wanted = [part.job.wanted(now) for part in self.parts]
        if not all(wanted):
            pixels = pixels[np.repeat(wanted, [len(part) for part in self.parts])]
            self.parts = [part for part, it in zip(self.parts, wanted, strict=True) if it]
        return pixels


def normalized(rows: Rows) -> tuple[Rows, NDArray[np.bool_]]:
    """(n, d) rows with unit L2 norm, and a mask of the rows that are no embedding: not finite, or all zero.

    Computed in float64, as in the monitor: the square of a finite float32 can overflow float32.
    """
    made = torch.from_numpy(rows)
    return normalize(made).numpy(), faulty(made).numpy()


def embed_splitting(encoder: Encoder, pixels: Pixels) -> Rows:
    """Call encoder.embed, in halves if the device runs out of memory."""
    try:
        return encoder.embed(pixels)
    except torch.OutOfMemoryError:
        if len(pixels) == 1:
            raise
    # Outside the except block: its traceback would keep the failed pass's tensors in memory.
    torch.cuda.empty_cache()
    half = len(pixels) // 2
    return np.concatenate([embed_splitting(encoder, pixels[:half]), embed_splitting(encoder, pixels[half:])])
