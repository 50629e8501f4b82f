r"""Shared parts of BYOL, SimSiam, DirectPred and DirectCopy, which predict a target network's output of the other view.

L = 1/2 [ l(q(f_1), t_2) + l(q(f_2), t_1) ],   f = projector(encoder(x)), q the predictor, t the target's output
target <- tau target + (1 - tau) online        after every step

The loss is the mean over the two directions, as in SimSiam. BYOL's equation and DirectPred's code take the sum. So
double their published learning rates for SGD. For LARS halve the weight decay and double the rate of biases and
BatchNorm; on matrices the rest cancels.
"""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from training.methods.base import Encoder, Method, ParameterGroup, trainable, wide, within
from training.methods.predictor import Predictor


@wide
def regression(prediction: Tensor, target: Tensor) -> Tensor:
    """2 - 2 cos(prediction, target), averaged over rows (BYOL's equation 2): (n, d), (n, d) -> scalar in [0, 4]."""
    return 2 - 2 * F.cosine_similarity(prediction, target, dim=1).mean()


def crossed(rows: Tensor) -> Tensor:
    """Exchange the views of rows (2n, k): row i becomes that of the other view of the same image."""
    return torch.cat(rows.chunk(2)[::-1])


@dataclass(frozen=True, kw_only=True)
class Switches:
    """Options that these methods share, with the parts that the papers turn on and off. Defaults differ by method."""

    momentum: float | None = None
    """tau; None for no average: the target is the online network as it is."""
    constant_momentum: bool = False
    """tau stays (DirectPred) instead of rising to 1 as a cosine (BYOL)."""
    stop_gradient: bool = True
    """False: the target is the online network and the loss is minimised from both sides."""
    predictor_lr: float = 1.0
    """The predictor's learning rate over that of the rest (alpha_p of Tian et al.)."""
    constant_predictor_lr: bool = False
    predictor_weight_decay: float | None = None
    """None: the run's."""

    def __post_init__(self) -> None:
        within("momentum", self.momentum or 0, 0, 1)
        within("predictor_lr", self.predictor_lr, 0, 1e6)
        within("predictor_weight_decay", self.predictor_weight_decay or 0, 0, 1e6)

    def tau(self, progress: float) -> float:
        """tau = 1 - (1 - tau_0)(cos(pi k/K) + 1)/2 (BYOL, section 3.3), or tau_0 where it is constant."""
        start = self.momentum or 0.0
        return start if self.constant_momentum else 1 - (1 - start) * (math.cos(math.pi * progress) + 1) / 2


class Target(nn.Module):
    """The online network itself, with or without the stop-gradient: (2n, c, h, w), (2n, k) -> (2n, k)."""

    def __init__(self, stop_gradient: bool = True) -> None:
        super().__init__()
        self.stop_gradient = stop_gradient

    def forward(self, views: Tensor, online: Tensor) -> Tensor:
        """The target rows of `views`, given their projections by the online network (`online`)."""
        return online.detach() if self.stop_gradient else online

    def follow(self, encoder: nn.Module, projector: nn.Module, tau: float) -> None:
        """Do nothing: the target is the online network."""


class SlowCopy(nn.Sequential):
    """The target network as a moving average of the online network, without gradient (BYOL, section 3.3)."""

    def __init__(self, encoder: nn.Module, projector: nn.Module) -> None:
        super().__init__(*copy.deepcopy(nn.Sequential(encoder, projector)))
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, views: Tensor, online: Tensor | None = None) -> Tensor:
        rows: Tensor = super().forward(views)  # type: ignore[no-untyped-call]
        return rows

    @torch.no_grad()
    def follow(self, encoder: nn.Module, projector: nn.Module, tau: float) -> None:
        """copy <- tau copy + (1 - tau) online, BatchNorm's statistics too."""
        online = nn.Sequential(encoder, projector).state_dict().values()
        pairs = list(zip(self.state_dict().values(), online, strict=True))
        floats = [pair for pair in pairs if pair[0].is_floating_point()]
        get_ema_multi_avg_fn(tau)(*zip(*floats, strict=True), 0)  # type: ignore[no-untyped-call]
        for slow, fast in pairs:
            if not slow.is_floating_point():
                slow.copy_(fast)


def target_of(encoder: Encoder, projector: nn.Module, switches: Switches) -> Target | SlowCopy:
    """The slow copy if there is an average and a stop-gradient, else the online network."""
    if switches.stop_gradient and switches.momentum is not None:
        return SlowCopy(encoder, projector)
    return Target(switches.stop_gradient)


class Predictive(Method):
    """The loss above. A subclass sets `predictor` and `target`, and if they differ `projector`, `cost` and `least`."""

    options: Switches
    predictor: Predictor
    target: Target | SlowCopy
    cost = staticmethod(regression)
    least = 0.0
    """`cost` of a prediction that equals its target."""

    def __init__(self, encoder: Encoder, options: Switches) -> None:
        super().__init__(encoder)
        self.options = options

    def forward(self, views: Tensor) -> Tensor:
        f = self.project(self.encoder(views))
        t = crossed(self.target(views, f))
        self.predictor.observe(f, t)
        return self.cost(self.predictor(f), t)

    def step(self, progress: float) -> None:
        self.predictor.step()
        self.target.follow(self.encoder, self.projector, self.options.tau(progress))

    def parameter_groups(self) -> list[ParameterGroup]:
        """The encoder and projector under the run's settings; the predictor, if it is trained, under its own."""
        options = self.options
        groups: list[ParameterGroup] = [
            {"params": trainable([*self.encoder.parameters(), *self.projector.parameters()])}
        ]
        if parameters := trainable(self.predictor.parameters()):
            groups.append(
                {
                    "params": parameters,
                    "lr_scale": options.predictor_lr,
                    "constant_lr": options.constant_predictor_lr,
                }
            )
            if options.predictor_weight_decay is not None:
                groups[-1]["weight_decay"] = options.predictor_weight_decay
        return groups

    def trivial_loss(self, images: int) -> float:
        """Every prediction equals its target."""
        return self.least

    def watch(self) -> dict[str, list[float] | float]:
        return self.predictor.watch()
