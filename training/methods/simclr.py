"""SimCLR: agree with your other view, disagree with every other image (Chen et al., ICML 2020)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import ResNet
from models.heads import mlp
from training.methods.base import Method


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross entropy, equation 1: (n, d), (n, d) -> scalar.

    Each of the 2n rows has its other view as the positive and the remaining 2n - 2 rows as negatives.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    n = len(z1)
    positives = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(logits, positives)


class SimCLR(Method):
    def __init__(self, encoder: ResNet, *, projection: int = 128, hidden: int = 512, temperature: float = 0.2) -> None:
        super().__init__(encoder)
        self.projector: nn.Module = mlp(encoder.dimension, hidden, projection)
        self.temperature = temperature

    def forward(self, views: Tensor) -> Tensor:
        z1, z2 = self.projector(self.encoder(views)).float().chunk(2)
        return nt_xent(z1, z2, self.temperature)
