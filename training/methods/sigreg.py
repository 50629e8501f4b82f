r"""SIGReg: agree, and make every random projection of the embedding a standard Gaussian (LeJEPA, arXiv 2511.08544).

L = (1 - lambda) mean |z - (z_1 + z_2)/2|^2 + lambda mean over views and slices a of T(a.z)

T(x) = n int |1/n sum_j exp(i t x_j) - exp(-t^2/2)|^2 exp(-t^2/2) dt                   (Epps & Pulley 1983)

A Gaussian in every direction, with the same variance in each, is an isotropic cloud: full rank is what this asks for.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank import gaussianity
from fullrank.gaussianity import random_slices
from models.heads import mlp
from training.distributed import all_reduce
from training.methods.base import Encoder, Method, wide, within


def epps_pulley(x: Tensor) -> Tensor:
    """T of each column of the joint batch of all processes: (n, m) -> (m,), 0 for what is exactly Gaussian."""
    rows = all_reduce(x.new_tensor(float(len(x))))
    angles = x.unsqueeze(2) * gaussianity.frequencies(x)
    return gaussianity.epps_pulley(all_reduce(angles.cos().sum(0)) / rows, all_reduce(angles.sin().sum(0)) / rows, rows)


@wide
def sigreg(z1: Tensor, z2: Tensor, a: Tensor, weight: float) -> Tensor:
    """L of two views' rows, (n, d) each, on slices (d, m) -> scalar. `weight` is lambda.

    The distance of both views from their mean is a quarter of their squared distance, averaged over coordinates.
    """
    a = a.to(z1.dtype)
    spread = (epps_pulley(z1 @ a).mean() + epps_pulley(z2 @ a).mean()) / 2
    return (1 - weight) * F.mse_loss(z1, z2) / 4 + weight * spread


@dataclass(frozen=True, kw_only=True)
class Options:
    """Published: lambda 0.05, some hundred to a thousand slices drawn anew at each step; no stop-gradient, no average.
    The projector's widths here are ours.
    """

    projection: int = 64
    hidden: int = 2048
    slices: int = 256
    weight: float = 0.05
    """lambda."""

    def __post_init__(self) -> None:
        within("weight", self.weight, 0, 1)


class SIGReg(Method):
    """SIGReg. It needs no negatives, no second network and no covariance matrix. Its cost is linear in n and d."""

    steps: Tensor

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder)
        self.options = options
        self.projector = mlp(encoder.dimension, options.hidden, options.hidden, options.projection)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, views: Tensor) -> Tensor:
        z1, z2 = self.project(self.encoder(views)).chunk(2)
        a = random_slices(self.options.projection, self.options.slices, int(self.steps)).to(z1.device)
        return sigreg(z1, z2, a, weight=self.options.weight)

    def step(self, progress: float) -> None:
        self.steps += 1

    def trivial_loss(self, images: int) -> float:
        """lambda T for rows that all lie at the origin, the best of all points to collapse to."""
        return self.options.weight * images * collapsed_statistic()


def collapsed_statistic() -> float:
    """T / n of rows that are all 0: sqrt(2 pi) (1 - 2/sqrt 2 + 1/sqrt 3)."""
    return math.sqrt(2 * math.pi) * (1 - math.sqrt(2) + 1 / math.sqrt(3))
