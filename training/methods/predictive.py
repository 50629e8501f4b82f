r"""What BYOL, SimSiam, DirectPred and DirectCopy share: predict the target's view of an image from your own.

L = 1/2 [ l(q(f_1), t_2) + l(q(f_2), t_1) ],   f = projector(encoder(x)), q the predictor, t the target's output
target <- tau target + (1 - tau) online        after every step
"""

import copy
import math
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from models.backbones.resnet import ResNet
from training.methods.base import Method, ParameterGroup, trainable, within
from training.methods.predictor import LinearPredictor


def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos(prediction, target), averaged over rows (BYOL's equation 2): (n, d), (n, d) -> scalar in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1).mean()


class Switches(TypedDict, total=False):
    """What the papers turn on and off; each method has its own defaults."""

    momentum: float | None
    """tau; None for no average: the target is the online network as it is."""
    constant_momentum: bool
    """tau stays (DirectPred) instead of rising to 1 as a cosine (BYOL)."""
    stop_gradient: bool
    """False: the target is the online network and the loss is minimised from both sides."""
    predictor_lr: float
    """The predictor's learning rate over that of the rest (alpha_p of Tian et al.)."""
    constant_predictor_lr: bool
    predictor_weight_decay: float | None
    """None: the run's."""


class Predictive(Method):
    """The loss is the mean over the two directions, as SimSiam's. BYOL's equation and DirectPred's code take the sum:
    under SGD their published learning rates are to be doubled here; LARS' rates of matrices do not notice."""

    def __init__(
        self,
        encoder: ResNet,
        projector: nn.Module,
        predictor: nn.Module,
        *,
        momentum: float | None = None,
        constant_momentum: bool = False,
        stop_gradient: bool = True,
        predictor_lr: float = 1.0,
        constant_predictor_lr: bool = False,
        predictor_weight_decay: float | None = None,
    ) -> None:
        super().__init__(encoder)
        within("momentum", momentum or 0, 0, 1)
        within("predictor_lr", predictor_lr, 0, 1e6)
        within("predictor_weight_decay", predictor_weight_decay or 0, 0, 1e6)
        self.projector, self.predictor, self.stop_gradient = projector, predictor, stop_gradient
        self.momentum, self.constant_momentum = momentum, constant_momentum
        self.target: nn.Module | None = None
        if stop_gradient and momentum is not None:
            self.target = copy.deepcopy(nn.Sequential(encoder, projector)).requires_grad_(False)
        self.group: ParameterGroup = {"params": [], "lr_scale": predictor_lr, "constant_lr": constant_predictor_lr}
        if predictor_weight_decay is not None:
            self.group["weight_decay"] = predictor_weight_decay

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return regression(a, b)

    def pair(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """Predictions and targets, (2n, k) both: row i of the target is the other view of what row i predicts from."""
        f = self.project(self.encoder(views))
        t = f
        if self.stop_gradient:
            with torch.no_grad():
                t = f.detach() if self.target is None else self.target(views)
        other = torch.cat(t.chunk(2)[::-1])
        if self.training and isinstance(self.predictor, LinearPredictor):
            self.predictor.observe(f, other)
        return self.predictor(f), other

    @torch.no_grad()
    def step(self, progress: float) -> None:
        """Symmetrise the predictor if asked; move the target, BatchNorm's statistics too (BYOL, section 3.3)."""
        if isinstance(self.predictor, LinearPredictor):
            self.predictor.symmetrise()
        if self.target is None or self.momentum is None:
            return
        tau = self.momentum
        if not self.constant_momentum:
            tau = 1 - (1 - tau) * (math.cos(math.pi * progress) + 1) / 2
        online = nn.Sequential(self.encoder, self.projector).state_dict().values()
        pairs = list(zip(self.target.state_dict().values(), online, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(tau)(*zip(*floats, strict=True), 0)  # type: ignore[no-untyped-call]
        for slow, fast in pairs:
            if not slow.is_floating_point():
                slow.copy_(fast)

    def parameter_groups(self) -> list[ParameterGroup]:
        predictor = trainable(self.predictor.parameters())
        rest = trainable([*self.encoder.parameters(), *self.projector.parameters()])
        groups: list[ParameterGroup] = [{"params": rest}]
        if predictor:
            groups.append({**self.group, "params": predictor})
        return groups

    def watch(self) -> dict[str, list[float] | float]:
        return self.predictor.watch() if isinstance(self.predictor, LinearPredictor) else {}
