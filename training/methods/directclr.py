r"""DirectCLR: contrast a sub-vector of the representation itself, no projector (Jing et al., ICLR 2022, section 6).

L = -sum_i log [ exp(z_i.z'_i/tau) / sum_j exp(z_i.z'_j/tau) ],   z = h[:d0] / |h[:d0]|
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from training.distributed import gather
from training.methods.base import Encoder, Method, wide, within


@wide
def info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE in both directions on the joint batch, averaged: (n, d), (n, d) -> scalar.

    Negatives are the other images' rows of the *other* view only, n - 1 of them, as the paper's text has it.
    """
    logits = F.normalize(gather(z1), dim=1) @ F.normalize(gather(z2), dim=1).T / temperature
    positives = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


@dataclass(frozen=True, kw_only=True)
class Options:
    """Published: temperature 0.1 and d0 360 of 2048, the share that is taken if d0 is not given."""

    d0: int | None = None
    temperature: float = 0.1

    def __post_init__(self) -> None:
        within("temperature", self.temperature, 1e-3, 1e3)


class DirectCLR(Method):
    """DirectCLR: the loss is on z = h[:, :d0]. The rest of h is trained through the residual stream (section 6.1)."""

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder)
        self.d0 = max(1, encoder.dimension * 360 // 2048) if options.d0 is None else options.d0
        if not 0 < self.d0 <= encoder.dimension:
            raise ValueError(f"d0 is {self.d0}; it must lie between 1 and the representation's {encoder.dimension}")
        self.temperature = options.temperature

    def project(self, h: Tensor) -> Tensor:
        return h[:, : self.d0]

    def forward(self, views: Tensor) -> Tensor:
        z1, z2 = self.project(self.encoder(views)).chunk(2)
        return info_nce(z1, z2, self.temperature)

    def trivial_loss(self, images: int) -> float:
        """ln n: the positive is one of n rows that are all alike."""
        return math.log(images)
