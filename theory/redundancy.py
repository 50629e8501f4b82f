r"""The least Barlow Twins loss of a linear encoder under noise, and what a loss near it says of the rank.

Inputs are N(0, I_d), and both views add noise of variance k to the last m of them. With q = 1/(1 + k) let
M = diag(1, …, 1, q, …, q). A linear encoder's standardised outputs are unit rows U in the coordinates where a view is
white; then C = U M Uᵀ, and with S = UᵀU, of trace d, tr C = tr MS and |C|² = tr MSMS. For λ ≤ 1 the loss is convex in
the C_ii at a given sum, so

    L ≥ d(1 − tr MS/d)² − λ(tr MS)²/d + λ tr MSMS .

The right side is quadratic in S. Its least value is at S = diag(a, …, a, b, …, b), (d − m)a + mb = d,

    b = λ(m/(d − m) + q) / A',    A' = (1 − λ)m(1 − q)²/d + λ(m/(d − m) + q²),

and is reached: a rotation that spreads the noisy directions evenly over the outputs makes all C_ii equal (Schur and
Horn). For λ > 1 the value at λ = 1 is still a lower bound. With Δ = S − S* and E the excess of a loss over the bound,

    E ≥ λ(|Δ_cc|² + 2q|Δ_cn|² + q²|Δ_nn|²) + (1 − λ)(tr MΔ)²/d,    so   |tr S_nn/m − b| ≤ w = √(E/mA') ,

whatever the encoder and however it was trained (c: clean, n: noisy block). The effective rank of the outputs, that of
S, is then between d²/|S|², for the largest |S|² that the first allows, and the rank of diag(a, b) for a b within w of
the best.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from theory.toys import F64

ROUNDING = 1e-14  # of a loss: float64 tells no smaller excess


@dataclass(frozen=True)
class Best:
    """The best encoder at λ: its loss, and the eigenvalues a (d − m of them) and b (m) of S.

    For λ > 1 it is the best one at λ = 1, and `loss` is a lower bound.
    """

    dimension: int
    noisy: int
    factor: float  # q
    penalty: float  # min(λ, 1)
    share: float  # b

    @property
    def clean(self) -> float:
        """a: what is left of the trace for a clean direction."""
        return self.of_clean(self.share)

    def of_clean(self, share: float) -> float:
        return (self.dimension - self.noisy * share) / (self.dimension - self.noisy)

    @property
    def loss(self) -> float:
        d, m, q, lam = self.dimension, self.noisy, self.factor, self.penalty
        lost = m * self.share * (1 - q)  # d − tr MS
        redundancy = (d - m) * self.clean**2 + m * (self.share * q) ** 2 - (d - lost) ** 2 / d
        return lost**2 / d + lam * redundancy

    @property
    def stiffness(self) -> float:
        """mA': the loss rises by this times (b − b*)², at least."""
        return self.noisy * _stiffness(self.dimension, self.noisy, self.factor, self.penalty)

    def rank(self, share: float | None = None) -> float:
        """Effective rank of diag(a, b): the most at a given share b of the noisy directions."""
        b = self.share if share is None else share
        parts = [(self.dimension - self.noisy, self.of_clean(b)), (self.noisy, b)]
        return self.dimension * math.exp(-sum(n * v * math.log(v) for n, v in parts if v > 0) / self.dimension)

    def share_within(self, loss: float) -> float:
        """w: how far from b the noisy directions' share can be at this loss."""
        return math.sqrt(max(loss - self.loss, ROUNDING * loss) / self.stiffness)

    def ranks(self, loss: float) -> tuple[float, float]:
        """The least and the largest effective rank of an encoder with this loss."""
        d, m, q, lam = self.dimension, self.noisy, self.factor, self.penalty
        excess, w = max(loss - self.loss, 0) / lam, self.share_within(loss)
        low, high = max(self.share - w, 0), min(self.share + w, d / m)
        most = float(d) if low <= 1 <= high else max(self.rank(low), self.rank(high))
        # |S|² = |S*|² + 2(b − a)tr Δ_nn + |Δ|², or by blocks; S_nn is positive with the trace mb.
        whole = (d - m) * self.clean**2 + m * self.share**2
        first = whole + 2 * m * w * abs(self.share - self.clean) + excess / q**2
        cc, nn = (d - m) ** 0.5 * self.clean + excess**0.5, m * high
        second = cc**2 + 2 * min(cc * nn, excess / (2 * q)) + nn**2
        return max(1, d**2 / min(first, second)), most


def _stiffness(d: int, m: int, q: float, lam: float) -> float:
    return (1 - lam) * m * (1 - q) ** 2 / d + lam * (m / (d - m) + q**2)


def best(dimension: int, noisy: int, amplitude: float, penalty: float) -> Best:
    """The best linear encoder of d inputs of which m carry noise of variance k, at λ or, above it, at 1."""
    q, lam, odds = 1 / (1 + amplitude), min(penalty, 1.0), noisy / (dimension - noisy)
    share = lam * (odds + q) / _stiffness(dimension, noisy, q, lam)
    return Best(dimension, noisy, q, lam, share)


def reachable(dimension: int, noisy: int, amplitude: float, penalty: float) -> float:
    """A loss that some encoder has: the least for λ ≤ 1, one direction an output above it."""
    if penalty <= 1:
        return best(dimension, noisy, amplitude, penalty).loss
    return noisy * (amplitude / (1 + amplitude)) ** 2


def outputs(weights: Tensor, noisy: int, amplitude: float) -> tuple[Tensor, Tensor]:
    """C and S (..., d, d) of encoders (..., d, d), on endless data."""
    q = torch.ones(weights.shape[-1], dtype=F64)
    q[-noisy:] = 1 / (1 + amplitude)
    rows = weights * q.rsqrt()
    u = rows / rows.norm(dim=-1, keepdim=True)
    return u * q @ u.mT, u.mT @ u


def endless_loss(c: Tensor, penalty: Tensor) -> Tensor:
    """The loss of C (..., d, d) itself, without a batch."""
    diagonal = c.diagonal(dim1=-2, dim2=-1)
    return (1 - diagonal).square().sum(-1) + penalty * (c.square().sum((-2, -1)) - diagonal.square().sum(-1))


def hypergeometric(a: float, c: float, z: Tensor) -> Tensor:
    """₂F₁(a, a; c; z) for 0 <= z <= 1 and c well above 2a, by its series."""
    term, total = torch.ones_like(z), torch.ones_like(z)
    for k in range(400):
        term = term * (a + k) ** 2 / ((c + k) * (k + 1)) * z
        total = total + term
        if bool((term <= 1e-15 * total).all()):
            break
    return total


def batch_loss(c: Tensor, penalty: Tensor, rows: int) -> Tensor:
    """The expected loss on a batch of so many Gaussian rows, exactly; C (..., d, d).

    Each entry is the correlation r of n rows of two normal variables of correlation ρ (Hotelling, 1953):
    E r² = 1 − (n − 2)/(n − 1) (1 − ρ²) ₂F₁(1, 1; (n + 1)/2; ρ²),
    E r = 2/(n − 1) (Γ(n/2)/Γ((n − 1)/2))² ρ ₂F₁(1/2, 1/2; (n + 1)/2; ρ²).
    """
    n, square = rows, c.square().clamp(max=1)
    gammas = math.exp(2 * (math.lgamma(n / 2) - math.lgamma((n - 1) / 2)))
    first = 2 / (n - 1) * gammas * c * hypergeometric(0.5, (n + 1) / 2, square)
    second = 1 - (n - 2) / (n - 1) * (1 - square) * hypergeometric(1.0, (n + 1) / 2, square)
    r, r2 = first.diagonal(dim1=-2, dim2=-1), second.diagonal(dim1=-2, dim2=-1)
    kept: Tensor = (1 - 2 * r + r2).sum(-1)
    return kept + penalty * (second.sum((-2, -1)) - r2.sum(-1))
