"""Rows for a monitor to watch, and a clock for it to read."""

import torch
from torch import Tensor

D = 32


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def rows_of(n: int, seed: int = 0, d: int = D) -> Tensor:
    """(n, d) Gaussian rows of falling variance about a common mean."""
    torch.manual_seed(seed)
    return torch.randn(n, d) * torch.arange(1, d + 1).float() ** -0.5 + 0.2


def unit(rows: Tensor) -> Tensor:
    return torch.nn.functional.normalize(rows.double())
