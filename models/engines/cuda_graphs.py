"""CUDA graphs: recorded forward passes of fixed batch sizes. A pass is one launch instead of one for each kernel."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor


def buckets(max_batch: int) -> list[int]:
    """The batch sizes to record: powers of two up to max_batch, and max_batch. Padding at most doubles a batch."""
    sizes = [1]
    while 2 * sizes[-1] < max_batch:
        sizes.append(2 * sizes[-1])
    return [*sizes, max_batch] if max_batch > 1 else sizes


class Graphs:
    """Passes of fixed batch sizes recorded on a CUDA device: one launch instead of one for each kernel.

    Recorded largest first, so that the smaller ones reuse its memory. One thread at a time may run them. Nothing here
    has been run in this project's tests, which have no CUDA device; only `buckets` and the choice of one have.
    """

    def __init__(
        self, forward: Callable[[Tensor], Tensor], shape: tuple[int, ...], sizes: Iterable[int], device: torch.device
    ) -> None:
        self._inputs: dict[int, Tensor] = {}
        self._outputs: dict[int, Tensor] = {}
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = None
        with torch.cuda.device(device):
            for size in sorted(sizes, reverse=True):
                given = self._inputs[size] = torch.zeros((size, *shape), dtype=torch.uint8, device=device)
                aside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                aside.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(aside):
                    for _ in range(3):  # kernels are chosen and workspaces made before anything is recorded
                        forward(given)
                torch.cuda.current_stream().wait_stream(aside)
                graph = self._graphs[size] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool):
                    self._outputs[size] = forward(given)
                pool = graph.pool()

    def __call__(self, batch: Tensor) -> Tensor:
        """(n, c, s, s) uint8, best in pinned memory -> (n, d), to be copied before the next call."""
        size = smallest(self._graphs, len(batch))
        self._inputs[size][: len(batch)].copy_(batch, non_blocking=True)
        self._graphs[size].replay()
        return self._outputs[size][: len(batch)]


def smallest(sizes: Iterable[int], images: int) -> int:
    """The smallest bucket that holds this many images. Raises ValueError if none does."""
    return min(size for size in sizes if size >= images)
