"""DirectCLR: contrast a sub-vector of the representation itself, no projector (Jing et al., ICLR 2022, section 6)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.backbones import ResNet
from training.methods.base import Method


def info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE in both directions, averaged: (n, d), (n, d) -> scalar.

    Negatives are the other images' rows of the *other* view only, n - 1 of them, as the paper's text has it.
    """
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    positives = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


class DirectCLR(Method):
    """z = h[:, :d0]; the rest of h is trained through the residual stream alone (section 6.1)."""

    def __init__(self, encoder: ResNet, *, d0: int, temperature: float = 0.1) -> None:
        super().__init__(encoder)
        if not 0 < d0 <= encoder.dimension:
            raise ValueError(f"d0 is {d0}; it must lie between 1 and the representation's {encoder.dimension}")
        self.d0, self.temperature = d0, temperature

    def project(self, h: Tensor) -> Tensor:
        return h[:, : self.d0]

    def forward(self, views: Tensor) -> Tensor:
        z1, z2 = self.project(self.encoder(views)).float().chunk(2)
        return info_nce(z1, z2, self.temperature)
