r"""DirectCopy: DirectPred without the eigendecomposition (Wang, Chen, Du & Tian 2021, arXiv:2110.04947).

    W_p = F/|F| + epsilon I,   F <- rho F + (1 - rho) E[f f^T],   |F| the largest eigenvalue

It is DirectSet(alpha), W_p = F^alpha, at alpha = 1 where DirectPred has 1/2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from training.methods.base import Encoder, within
from training.methods.directpred import ClosedForm, ClosedFormOptions


def copied(correlation: Tensor, epsilon: float, normalize: bool = True) -> Tensor:
    """W_p of a (d, d) correlation matrix; `normalize` divides it by its spectral norm, without which the meaning of
    epsilon changes with the scale of the projector's output."""
    scale = torch.linalg.matrix_norm(correlation, 2) if normalize else correlation.new_ones(())
    scale = scale.clamp_min(torch.finfo(correlation.dtype).tiny)
    return correlation / scale + epsilon * torch.eye(len(correlation)).to(correlation)


@dataclass(frozen=True, kw_only=True)
class Options(ClosedFormOptions):
    """Heads and optimiser are DirectPred's, rho 0.3 and epsilon 0.1 too: the paper's own were not at hand."""

    epsilon: float = 0.1
    normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within("epsilon", self.epsilon, 0, 1e3)


class DirectCopy(ClosedForm):
    """W_p is a copy of its input's correlation matrix."""

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder, options)
        self.epsilon, self.normalize = options.epsilon, options.normalize

    def solution(self) -> Tensor:
        return copied(self.predictor.correlation, self.epsilon, self.normalize)
