r"""DirectPred: set BYOL's linear predictor in closed form from the statistics of its input (Tian et al., ICML 2021).

F = U diag(s) U^T,   p_j = sqrt(s_j) + epsilon max_j s_j,   W_p = U diag(p) U^T         (section 4, paper)
                     p_j = max(sqrt(max(s_j, 0)/max_j s_j) + epsilon, 1e-4)             (as released)
W_p = E[t f^T] (F + epsilon tr(F)/d I)^-1                                               (optimal: least squares)
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from models.heads import mlp
from training.methods.base import Encoder, within
from training.methods.predictive import Predictive, Switches, target_of
from training.methods.predictor import LinearPredictor

Variant = Literal["paper", "released", "optimal"]
EPSILON: dict[Variant, float] = {"paper": 0.1, "released": 0.01, "optimal": 0.01}


def spectral(correlation: Tensor, epsilon: float, released: bool = False) -> Tensor:
    """W_p of a (d, d) correlation matrix. The variants differ by more than scale: dividing the paper's by
    sqrt(max s) leaves epsilon sqrt(max s) where the released one has epsilon."""
    s, u = torch.linalg.eigh(correlation)
    root = s.clamp_min(0).sqrt()
    largest = s[-1].clamp_min(torch.finfo(s.dtype).tiny)
    p = (root / largest.sqrt() + epsilon).clamp_min(1e-4) if released else root + epsilon * largest
    predictor: Tensor = (u * p) @ u.T
    return predictor


def least_squares(correlation: Tensor, cross: Tensor, epsilon: float) -> Tensor:
    """argmin E|W f - t|^2 + ridge |W|^2, ridge = epsilon tr(F)/d, for F = E[f f^T] and E[t f^T], each (d, d)."""
    d = len(correlation)
    ridge = (epsilon * correlation.trace() / d).clamp_min(torch.finfo(correlation.dtype).tiny)
    regular = correlation.clone()
    regular.diagonal().add_(ridge)
    predictor: Tensor = torch.linalg.solve(regular, cross, left=False)
    return predictor


@dataclass(frozen=True, kw_only=True)
class ClosedFormOptions(Switches):
    """Options of a predictor that is set. Published for STL-10 and CIFAR-10: rho 0.3, projector 512-512-128, tau 0.996
    constant, SGD 0.03, weight decay 4e-4, batch 128.
    """

    projection: int = 128
    hidden: int = 512
    rho: float = 0.3
    frequency: int = 1
    """Steps from one closed form to the next; the predictor is trained in between."""
    momentum: float | None = 0.996
    constant_momentum: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within("frequency", self.frequency, 1, 1e9)


@dataclass(frozen=True, kw_only=True)
class Options(ClosedFormOptions):
    variant: Variant = "paper"
    """`optimal` is table 1's: it predicts best and learns worst."""
    epsilon: float | None = None
    """None: 0.1 for the paper's variant, 0.01 for the others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in EPSILON:
            raise ValueError(f"variant is {self.variant!r}; it must be one of {', '.join(EPSILON)}")
        within("epsilon", self.epsilon or 0, 0, 1e3)


class ClosedForm(Predictive):
    """BYOL with a linear predictor that is set to `solution` after every `frequency`-th step, not trained."""

    options: ClosedFormOptions
    predictor: LinearPredictor
    steps: Tensor

    def __init__(self, encoder: Encoder, options: ClosedFormOptions) -> None:
        super().__init__(encoder, options)
        self.projector = mlp(encoder.dimension, options.hidden, options.projection, affine=False)
        self.predictor = LinearPredictor(options.projection, rho=options.rho).requires_grad_(options.frequency > 1)
        self.target = target_of(encoder, self.projector, options)
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @abstractmethod
    def solution(self) -> Tensor:
        """(projection, projection): W_p from the predictor's running statistics."""

    @torch.no_grad()
    def step(self, progress: float) -> None:
        self.steps += 1
        # To read the counter the host has to wait for an accelerator; every step is the usual frequency.
        if self.options.frequency == 1 or self.steps % self.options.frequency == 0:
            self.predictor.weight.copy_(self.solution())
        super().step(progress)


class DirectPred(ClosedForm):
    """W_p shares its input's eigenvectors; its eigenvalues follow from its input's."""

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder, options)
        self.variant = options.variant
        self.epsilon = EPSILON[options.variant] if options.epsilon is None else options.epsilon

    def solution(self) -> Tensor:
        known = self.predictor
        if self.variant == "optimal":
            return least_squares(known.correlation, known.cross, self.epsilon)
        return spectral(known.correlation, self.epsilon, released=self.variant == "released")
