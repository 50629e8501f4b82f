"""BYOL: predict a slow copy of yourself across views, with no negatives (Grill et al., NeurIPS 2020)."""

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones import ResNet
from models.heads import mlp
from training.methods.base import Method


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos(prediction, target), averaged over rows (equation 2): (n, d), (n, d) -> scalar in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1).mean()


class BYOL(Method):
    """`predictor=False` and `stop_gradient=False` remove what keeps BYOL from collapsing; without stop-gradient the
    target is the online network itself, so that the loss can be minimised from both sides. A projector shields the
    representation from most of the collapse behind it; `projector=False` lets it through."""

    def __init__(
        self,
        encoder: ResNet,
        *,
        projection: int = 128,
        hidden: int = 512,
        momentum: float = 0.99,
        projector: bool = True,
        predictor: bool = True,
        stop_gradient: bool = True,
    ) -> None:
        super().__init__(encoder)
        width = projection if projector else encoder.dimension
        self.projector: nn.Module = mlp(encoder.dimension, hidden, projection) if projector else nn.Identity()
        self.predictor: nn.Module = mlp(width, hidden, width) if predictor else nn.Identity()
        self.momentum, self.stop_gradient = momentum, stop_gradient
        self.online = nn.Sequential(self.encoder, self.projector)
        self.target: nn.Module = copy.deepcopy(self.online).requires_grad_(False) if stop_gradient else self.online

    def forward(self, views: Tensor) -> Tensor:
        online = self.online(views)
        p1, p2 = self.predictor(online).float().chunk(2)
        if self.stop_gradient:
            with torch.no_grad():
                online = self.target(views)
        t1, t2 = online.float().chunk(2)
        return (regression(p1, t2) + regression(p2, t1)) / 2

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Move the target: xi <- tau xi + (1 - tau) theta, tau rising to 1 as a cosine (section 3.3). Buffers too."""
        if not self.stop_gradient:
            return
        tau = 1 - (1 - self.momentum) * (math.cos(math.pi * progress) + 1) / 2
        for slow, fast in zip(self.target.state_dict().values(), self.online.state_dict().values(), strict=True):
            if slow.is_floating_point():
                slow.lerp_(fast, 1 - tau)
            else:
                slow.copy_(fast)
