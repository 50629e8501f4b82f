"""Merges packed moments of many replicas one at a time, in the memory of one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from fullrank.moments import Moments


class Merging:
    """The sum of packed moments (`Moments.tensors(packed=True)`), exact, whatever their number.

    What a collector of many replicas needs: a triangle is added as it came, five to nine times as fast as reading it
    into `Moments` and merging that. Replicas of one reference share their shift; moments about another one take the
    longer way, to the same result.
    """

    def __init__(self, dimension: int) -> None:
        self.dimension = dimension
        self.parts = 0
        self._sums: dict[str, Tensor] = {}
        self._others = Moments(dimension)

    def add(self, tensors: Mapping[str, Tensor]) -> None:
        """Add one part's moments, packed or not. ValueError, and nothing added, for what is no moments or too wide."""
        d = self.dimension
        shapes = {"shift": (d,), "sum": (d,), "triangle": (d * (d + 1) // 2,), "cubic": (d,), "scalars": (3,)}
        known = all(name in tensors and tuple(tensors[name].shape) == shape for name, shape in shapes.items())
        shared = not self._sums or (known and torch.equal(tensors["shift"], self._sums["shift"]))
        if not (known and shared):
            self._others.merge(Moments.from_tensors(tensors))
        elif not all(tensors[name].sum().isfinite() for name in shapes):
            raise ValueError("moments: a tensor is not finite")
        elif not self._sums:
            self._sums = {name: tensors[name].to("cpu", torch.float64, copy=True) for name in shapes}
        else:
            for name in ("sum", "triangle", "cubic", "scalars"):
                self._sums[name] += tensors[name]
        self.parts += 1

    def total(self) -> Moments:
        """The moments of all rows so far."""
        whole = Moments.from_tensors(self._sums) if self._sums else Moments(self.dimension)
        return whole.merge(self._others)
