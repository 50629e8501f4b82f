r"""DirectCopy: DirectPred without the eigendecomposition (Wang, Chen, Du & Tian 2021, arXiv:2110.04947).

    W_p = F/|F| + epsilon I,   F <- rho F + (1 - rho) E[f f^T],   |F| the largest eigenvalue

It is DirectSet(alpha), W_p = F^alpha, at alpha = 1 where DirectPred has 1/2.
"""

from typing import Any

import torch
from torch import Tensor

from models.backbones.resnet import ResNet
from training.methods.closed_form import ClosedForm


def copied(correlation: Tensor, epsilon: float, normalize: bool = True) -> Tensor:
    """W_p of a (d, d) correlation matrix; `normalize` divides it by its spectral norm, without which the meaning of
    epsilon changes with the scale of the projector's output."""
    scale = torch.linalg.matrix_norm(correlation, 2) if normalize else correlation.new_ones(())
    scale = scale.clamp_min(torch.finfo(correlation.dtype).tiny)
    return correlation / scale + epsilon * torch.eye(len(correlation)).to(correlation)


class DirectCopy(ClosedForm):
    """Heads and optimiser are DirectPred's, rho 0.3 and epsilon 0.1 too: the paper's own were not at hand."""

    def __init__(self, encoder: ResNet, *, normalize: bool = True, **options: Any) -> None:
        super().__init__(encoder, **options)
        self.normalize = normalize

    def solution(self) -> Tensor:
        return copied(self.predictor.correlation, self.epsilon, self.normalize)
