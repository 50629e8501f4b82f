"""The pieces several labs share: the paper's InfoNCE, batches, orthogonal matrices, a Runge-Kutta step."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from fullrank.measures import effective_rank

F64 = torch.float64


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    """Independent standard normal entries, float64."""
    return torch.randn(*shape, dtype=F64, generator=generator)


def orthogonal(generator: torch.Generator, dimension: int) -> Tensor:
    """A Haar-distributed (d, d) orthogonal matrix: QR of a Gaussian one, signs fixed by R's diagonal."""
    q: Tensor
    q, r = torch.linalg.qr(normal(generator, dimension, dimension))
    return q * torch.sign(torch.diagonal(r))


def batches(rows: Tensor, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless (size, d) batches without replacement inside an epoch.

    With replacement duplicates meet as negatives at distance zero, and the toy collapses by that alone.
    """
    while True:
        order = torch.randperm(len(rows), generator=generator)
        for start in range(0, len(rows) - size + 1, size):
            yield rows[order[start : start + size]]


def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(..., n, m) squared Euclidean distances between the rows of a (..., n, d) and b (..., m, d)."""
    return a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - 2 * a @ b.transpose(-1, -2)


def attention(z: Tensor, pair: Tensor) -> Tensor:
    """alpha (..., n, n) of Jing et al. 2022: the softmax of -|.|^2/2 over pair i (diagonal) and the other z_j."""
    logits = -0.5 * squared_distances(z, z)
    own = -0.5 * (z - pair).square().sum(-1)
    eye = torch.eye(z.shape[-2], dtype=torch.bool)
    return torch.where(eye, own[..., :, None], logits).softmax(-1)


def infonce(z: Tensor, pair: Tensor) -> Tensor:
    """Jing et al. 2022, equation 1, summed over the batch: -sum_i log alpha_ii; negatives are un-augmented.

    z, pair: (..., n, d), row i of both from the same input. Leading axes are independent problems.
    """
    logits = -0.5 * squared_distances(z, z)
    own = -0.5 * (z - pair).square().sum(-1)
    eye = torch.eye(z.shape[-2], dtype=torch.bool)
    return (torch.where(eye, own[..., :, None], logits).logsumexp(-1) - own).sum(-1)


def covariance(z: Tensor) -> Tensor:
    """(..., d, d) covariance of rows (..., n, d)."""
    centred = z - z.mean(-2, keepdim=True)
    return centred.transpose(-1, -2) @ centred / z.shape[-2]


def rank_of(matrix: Tensor) -> float:
    """Effective rank of a symmetric positive semi-definite matrix."""
    return float(effective_rank(torch.linalg.eigvalsh(matrix).clamp(min=0)))


Field = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def stride(left: float, longest: float, most: int) -> tuple[int, float, float]:
    """The next steps of equal length through the time `left`: (how many, their length, the time left after them).

    longest: what a step may take in the state of the moment. It is to be asked again after `most` steps.
    """
    count = math.ceil(left / longest)
    taken, length = min(count, most), left / count
    return taken, length, 0.0 if taken == count else left - taken * length


def runge_kutta(field: Field, state: Sequence[Tensor], step: float) -> list[Tensor]:
    """One classical fourth-order step of the flow `field`."""

    def moved(slope: Sequence[Tensor], by: float) -> list[Tensor]:
        return [torch.add(value, change, alpha=by) for value, change in zip(state, slope, strict=True)]

    a = field(state)
    b = field(moved(a, step / 2))
    c = field(moved(b, step / 2))
    d = field(moved(c, step))
    outer = [k1 + k4 for k1, k4 in zip(a, d, strict=True)]
    inner = [k2 + k3 for k2, k3 in zip(b, c, strict=True)]
    state = moved(outer, step / 6)
    return moved(inner, step / 3)
