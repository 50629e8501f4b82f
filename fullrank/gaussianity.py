"""Epps and Pulley's statistic: how far values are from a standard Gaussian law. Training and monitoring share it.

T(x) = n int |1/n sum_j exp(i t x_j) - exp(-t^2/2)|^2 exp(-t^2/2) dt              (Epps & Pulley 1983)
"""

import math

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

FURTHEST = 5.0
POINTS = 17
"""The integral runs from -5 to 5 by the trapezoidal rule; beyond it the weight is below 4e-6."""


def frequencies(like: Tensor) -> Tensor:
    """(8,) the points t > 0 of the integral, of the tensor's dtype and device.

    The integrand is even in t, and 0 at t = 0, so that half of the points do.
    """
    return torch.linspace(0, FURTHEST, POINTS // 2 + 1, dtype=like.dtype, device=like.device)[1:]


def epps_pulley(cosines: Tensor, sines: Tensor, rows: Tensor | float) -> Tensor:
    """T from the empirical characteristic function of `rows` values at `frequencies`: its real and imaginary part.

    cosines, sines: (..., 8), means of cos(t x) and sin(t x) -> (...), 0 for what is exactly Gaussian.
    """
    t = frequencies(cosines)
    gaussian = torch.exp(-t.square() / 2)
    distance = (cosines - gaussian).square() + sines.square()
    weights = torch.full_like(t, 2 * float(t[0]))
    weights[-1] /= 2
    return rows * (distance * gaussian * weights).sum(-1)


def random_slices(dimension: int, count: int, seed: int) -> Tensor:
    """(dimension, count) random unit columns, the same wherever the seed is."""
    drawn = torch.randn(dimension, count, generator=Generator().manual_seed(seed))
    return F.normalize(drawn, dim=0)


def slice_statistic(rows: Tensor, slices: Tensor) -> float:
    """Mean of T over slices (d, m) of rows (n, d), each slice brought to mean 0 and variance 1; NaN below 32 rows.

    About 0.3 for Gaussian rows of any covariance; grows as n where they are not, so compare at equal n. Sees rows that
    fall into clusters at full rank, as no covariance does. Slices without variance are left out, NaN if all are.
    """
    projected = rows @ slices.to(rows)
    centred = projected - projected.mean(0)
    deviation = centred.square().mean(0).sqrt()
    # Below this the deviation is the rounding of the projections' own size.
    alive = deviation > 8 * torch.finfo(rows.dtype).eps * projected.abs().amax(0)
    if len(rows) < 32 or not bool(alive.any()):
        return math.nan
    x = centred[:, alive] / deviation[alive]
    angles = x.unsqueeze(2) * frequencies(x)
    return float(epps_pulley(angles.cos().mean(0), angles.sin().mean(0), float(len(x))).mean())
