"""Classification by the nearest label of noisy embeddings, and two bounds that need distances only."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from theory.toys import normal, squared_distances

DRAWS = 20_000


def _upper_tail(z: float) -> float:
    """Q(z), the chance that a standard normal exceeds z."""
    return 0.5 * math.erfc(z / math.sqrt(2))


def accuracy(means: Tensor, noise: float, generator: torch.Generator) -> tuple[float, float]:
    """The share of noisy copies of the class means (C, d) that lie nearest to their own, and its standard error.

    Every class is drawn equally often, with `noise` the standard deviation of each coordinate. What is read, the
    nearest of `means`, is the best classifier there is for such copies.
    """
    classes = torch.arange(DRAWS) % len(means)
    read = means[classes] + noise * normal(generator, DRAWS, means.shape[1])
    share = float((squared_distances(read, means).argmin(1) == classes).double().mean())
    return share, math.sqrt(max(share * (1 - share), 1 / DRAWS) / DRAWS)


def at_least(means: Tensor, noise: float) -> float:
    """1 - (C - 1) Q(δ/2s) for the smallest distance δ of two means: the union bound over the wrong classes."""
    return 1 - (len(means) - 1) * _upper_tail(float(torch.pdist(means).min()) / (2 * noise))


def at_most(means: Tensor, noise: float) -> float:
    """1/C + (1 - 1/C)(1 - 2 Q(Δ/2s)) for the largest distance Δ: what no classifier exceeds.

    With P̄ the mean of the classes' laws P_c, the accuracy is the mean of P_c(A_c) <= P̄(A_c) + TV(P_c, P̄). The first
    terms sum to 1. P̄ is P_c to a part 1/C, and the total variation of two classes is at most that of the farthest two,
    1 - 2 Q(Δ/2s).
    """
    chance = 1 / len(means)
    return chance + (1 - chance) * (1 - 2 * _upper_tail(float(torch.pdist(means).max()) / (2 * noise)))
