r"""DirectPred: set BYOL's linear predictor in closed form from the statistics of its input (Tian et al., ICML 2021).

F = U diag(s) U^T,   p_j = sqrt(s_j) + epsilon max_j s_j,   W_p = U diag(p) U^T         (section 4, paper)
                     p_j = max(sqrt(max(s_j, 0)/max_j s_j) + epsilon, 1e-4)             (as released)
W_p = E[t f^T] (F + epsilon tr(F)/d I)^-1                                               (optimal: least squares)
"""

from typing import Any, Literal

import torch
from torch import Tensor

from models.backbones.resnet import ResNet
from training.methods.closed_form import ClosedForm

Variant = Literal["paper", "released", "optimal"]
EPSILON: dict[Variant, float] = {"paper": 0.1, "released": 0.01, "optimal": 0.01}


def spectral(correlation: Tensor, epsilon: float, released: bool = False) -> Tensor:
    """W_p of a (d, d) correlation matrix. The variants differ by more than scale: dividing the paper's by
    sqrt(max s) leaves epsilon sqrt(max s) where the released one has epsilon."""
    s, u = torch.linalg.eigh(correlation)
    root, largest = s.clamp_min(0).sqrt(), s[-1].clamp_min(torch.finfo(s.dtype).tiny)
    p = (root / largest.sqrt() + epsilon).clamp_min(1e-4) if released else root + epsilon * largest
    predictor: Tensor = (u * p) @ u.T
    return predictor


def least_squares(correlation: Tensor, cross: Tensor, epsilon: float) -> Tensor:
    """argmin E|W f - t|^2 + ridge |W|^2, ridge = epsilon tr(F)/d, for F = E[f f^T] and E[t f^T], each (d, d)."""
    d = len(correlation)
    ridge = (epsilon * correlation.trace() / d).clamp_min(torch.finfo(correlation.dtype).tiny)
    predictor: Tensor = torch.linalg.solve(correlation + ridge * torch.eye(d).to(correlation), cross, left=False)
    return predictor


class DirectPred(ClosedForm):
    """Published for STL-10 and CIFAR-10: rho 0.3, epsilon 0.1 (released: 0.01), projector 512-512-128, tau 0.996
    constant, SGD 0.03, weight decay 4e-4, batch 128. `optimal` is table 1's: it predicts best and learns worst.
    """

    def __init__(
        self, encoder: ResNet, *, variant: Variant = "paper", epsilon: float | None = None, **options: Any
    ) -> None:
        if variant not in EPSILON:
            raise ValueError(f"variant is {variant!r}; it must be one of {', '.join(EPSILON)}")
        super().__init__(encoder, epsilon=EPSILON[variant] if epsilon is None else epsilon, **options)
        self.variant = variant

    def solution(self) -> Tensor:
        known = self.predictor
        if self.variant == "optimal":
            return least_squares(known.correlation, known.cross, self.epsilon)
        return spectral(known.correlation, self.epsilon, released=self.variant == "released")
