r"""DirectCopy: DirectPred without the eigendecomposition (Wang, Chen, Du & Tian 2021, arXiv:2110.04947).

    W_p = F/|F| + epsilon I,   F <- rho F + (1 - rho) E[f f^T],   |F| the largest eigenvalue

It is DirectSet(alpha), W_p = F^alpha, at alpha = 1 where DirectPred has 1/2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from models.heads import mlp
from training.methods.base import Encoder, Method, ParameterGroup, within
from training.methods.predictive import Switches, crossed, grouped, regression, target_of
from training.methods.predictor import LinearPredictor


def copied(correlation: Tensor, epsilon: float, normalize: bool = True) -> Tensor:
    """W_p of a (d, d) correlation matrix; `normalize` divides it by its spectral norm, without which the meaning of
    epsilon changes with the scale of the projector's output."""
    scale = torch.linalg.matrix_norm(correlation, 2) if normalize else correlation.new_ones(())
    scale = scale.clamp_min(torch.finfo(correlation.dtype).tiny)
    return correlation / scale + epsilon * torch.eye(len(correlation)).to(correlation)


@dataclass(frozen=True, kw_only=True)
class Options(Switches):
    """Heads and optimiser are DirectPred's, rho 0.3 and epsilon 0.1 too: the paper's own were not at hand."""

    projection: int = 128
    hidden: int = 512
    rho: float = 0.3
    epsilon: float = 0.1
    frequency: int = 1
    """Steps from one closed form to the next; the predictor is trained in between."""
    normalize: bool = True
    momentum: float | None = 0.996
    constant_momentum: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within("epsilon", self.epsilon, 0, 1e3)
        within("frequency", self.frequency, 1, 1e9)


class DirectCopy(Method):
    """BYOL with a linear predictor that is a copy of its input's correlation matrix."""

    steps: Tensor

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder)
        self.options = options
        self.projector = mlp(encoder.dimension, options.hidden, options.projection, affine=False)
        self.predictor = LinearPredictor(options.projection, rho=options.rho).requires_grad_(options.frequency > 1)
        self.target = target_of(encoder, self.projector, options)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def forward(self, views: Tensor) -> Tensor:
        f = self.project(self.encoder(views))
        t = crossed(self.target(views, f))
        self.predictor.observe(f, t)
        return regression(self.predictor(f), t)

    @torch.no_grad()
    def step(self, progress: float) -> None:
        self.steps += 1
        if self.steps % self.options.frequency == 0:
            known, options = self.predictor, self.options
            self.predictor.weight.copy_(copied(known.correlation, options.epsilon, options.normalize))
        self.target.follow(self.encoder, self.projector, self.options.tau(progress))

    def parameter_groups(self) -> list[ParameterGroup]:
        return grouped(self.encoder, self.projector, self.predictor, self.options)

    def trivial_loss(self, images: int) -> float:
        """0: every prediction equals its target."""
        return 0.0

    def watch(self) -> dict[str, list[float] | float]:
        return self.predictor.watch()
