r"""Predictors, which predict the target's row from the online network's.

The linear one, W_p, keeps the running statistics that Tian, Chen and Ganguli (ICML 2021) study:

F <- rho F + (1 - rho) E[f f^T],   f the projector's output of both views: neither centred nor normalised
"""

import torch
from torch import Tensor, nn

from models.heads import mlp
from training.distributed import all_reduce
from training.methods.base import within


class Predictor(nn.Module):
    """The base class of predictors, (n, k) -> (n, k), with three hooks that a predictor may override."""

    def observe(self, f: Tensor, t: Tensor) -> None:
        """Called before each prediction in training: f, t (n, k), row i of t is what row i of f has to predict."""

    def step(self) -> None:
        """Called after every optimiser step."""

    def watch(self) -> dict[str, list[float] | float]:
        """Entries that the predictor adds to an epoch's log record."""
        return {}


class NoPredictor(Predictor, nn.Identity):
    """No predictor: the projector's output is the prediction."""


class MLPPredictor(Predictor, nn.Sequential):
    """A predictor of two linear layers with BatchNorm and ReLU between them."""

    def __init__(self, width: int, hidden: int, *, final_bias: bool = False) -> None:
        super().__init__(*mlp(width, hidden, width, final_bias=final_bias))


class LinearPredictor(Predictor, nn.Linear):
    """f -> W_p f without a bias: (n, width) -> (n, width).

    `correlation` is the running F and `cross` the running E[t f^T], t the target that f has to predict, both over
    every process's rows. A `symmetric` W_p is projected back after each optimiser step. Under plain SGD that is the
    same as training it by the symmetric part of its gradient; an optimiser whose step is not linear in the gradient,
    such as LARS or AdamW, takes another step.
    """

    correlation: Tensor
    cross: Tensor

    def __init__(self, width: int, *, rho: float = 0.3, symmetric: bool = False) -> None:
        super().__init__(width, width, bias=False)
        within("rho", rho, 0, 1)
        self.rho = rho
        self.symmetric = symmetric
        self.register_buffer("correlation", torch.zeros(width, width))
        self.register_buffer("cross", torch.zeros(width, width))
        self.step()

    @torch.no_grad()
    def observe(self, f: Tensor, t: Tensor) -> None:
        if not self.training:
            return
        with torch.autocast(f.device.type, enabled=False):
            f = f.to(self.correlation.dtype)
            t = t.to(self.correlation.dtype)
            rows = all_reduce(f.new_tensor(float(len(f))))
            self.correlation.lerp_(all_reduce(f.T @ f) / rows, 1 - self.rho)
            self.cross.lerp_(all_reduce(t.T @ f) / rows, 1 - self.rho)

    @torch.no_grad()
    def step(self) -> None:
        if self.symmetric:
            self.weight.copy_((self.weight + self.weight.T) / 2)

    def watch(self) -> dict[str, list[float] | float]:
        """`predictor_alignment`: |cos(u, W_p u)| (figure 2) for the eigenvectors u of F, largest eigenvalue first,
        those under a thousandth of the largest left out: nothing trains there. `correlation_spectrum`: F's eigenvalues;
        `predictor_spectrum`: those of W_p's symmetric part; `predictor_asymmetry`: |W_p - W_p^T| / |W_p|."""
        w = self.weight.detach().double().cpu()
        f = self.correlation.double().cpu()
        s, u = torch.linalg.eigh(f)
        moved = w @ u
        norm = moved.norm(dim=0)
        alive = (s > 1e-3 * s[-1]) & (norm > 0)
        return {
            "predictor_alignment": _short(((u * moved).sum(0).abs() / norm)[alive].flip(0)),
            "correlation_spectrum": _short(s.flip(0)),
            "predictor_spectrum": _short(torch.linalg.eigvalsh((w + w.T) / 2).flip(0)),
            "predictor_asymmetry": float((w - w.T).norm() / w.norm().clamp_min(1e-30)),
        }


def _short(values: Tensor) -> list[float]:
    """The values with six digits: an epoch's log line holds hundreds of them."""
    return [float(f"{value:.6g}") for value in values.tolist()]
