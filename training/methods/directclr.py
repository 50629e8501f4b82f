r"""DirectCLR: contrast a sub-vector of the representation itself, no projector (Jing et al., ICLR 2022, section 6).

L = -sum_i log [ exp(z_i.z'_i/tau) / sum_j exp(z_i.z'_j/tau) ],   z = h[:d0] / |h[:d0]|
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from models.backbones.resnet import ResNet
from training.distributed import gather
from training.methods.base import Method, within


def info_nce(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """InfoNCE in both directions, averaged: (n, d), (n, d) -> scalar.

    Negatives are the other images' rows of the *other* view only, n - 1 of them, as the paper's text has it.
    """
    logits = F.normalize(z1, dim=1) @ F.normalize(z2, dim=1).T / temperature
    positives = torch.arange(len(z1), device=z1.device)
    return (F.cross_entropy(logits, positives) + F.cross_entropy(logits.T, positives)) / 2


class DirectCLR(Method):
    """z = h[:, :d0]; the rest of h is trained through the residual stream alone (section 6.1).

    Published: temperature 0.1 and d0 360 of 2048, the share that is taken here if d0 is not given.
    """

    def __init__(self, encoder: ResNet, *, d0: int | None = None, temperature: float = 0.1) -> None:
        super().__init__(encoder)
        d0 = max(1, encoder.dimension * 360 // 2048) if d0 is None else d0
        if not 0 < d0 <= encoder.dimension:
            raise ValueError(f"d0 is {d0}; it must lie between 1 and the representation's {encoder.dimension}")
        within("temperature", temperature, 1e-3, 1e3)
        self.d0, self.temperature = d0, temperature

    def project(self, h: Tensor) -> Tensor:
        return h[:, : self.d0]

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return info_nce(gather(a), gather(b), self.temperature)
