r"""VICReg: agree, keep every dimension's deviation above 1, decorrelate dimensions (Bardes et al., ICLR 2022).

L = lambda s(Z, Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')]                                       (equation 6)
s = mean (z - z')^2,   v = mean_j max(0, 1 - sqrt(Var(z_j) + 1e-4)),   c = 1/d sum_{i != j} Cov(Z)_ij^2
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from models.heads import mlp
from training.distributed import all_reduce
from training.methods.base import Encoder, Method, wide, within


def spread(z: Tensor) -> tuple[Tensor, Tensor]:
    """v and c of equation 6 on the joint batch of all processes: (n, d) -> scalars; n - 1 in the denominator."""
    rows = all_reduce(z.new_tensor(float(len(z))))
    centred = z - all_reduce(z.sum(0)) / rows
    covariance = all_reduce(centred.T @ centred) / (rows - 1)
    variance = covariance.diagonal()
    hinge = F.relu(1 - (variance + 1e-4).sqrt()).mean()
    return hinge, (covariance.square().sum() - variance.square().sum()) / z.shape[1]


@wide
def vicreg(z1: Tensor, z2: Tensor, invariance: float = 25, variance: float = 25, covariance: float = 1) -> Tensor:
    """(n, d), (n, d) -> scalar. The hinge is averaged over the two views and the covariance summed, as released."""
    (v1, c1), (v2, c2) = spread(z1), spread(z2)
    return invariance * F.mse_loss(z1, z2) + variance * (v1 + v2) / 2 + covariance * (c1 + c2)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Published: projector 8192-8192-8192, weights 25, 25 and 1; LARS 0.2 x batch/256, weight decay 1e-6. The widths
    here are solo-learn's for CIFAR-10."""

    projection: int = 2048
    hidden: int = 2048
    invariance: float = 25
    variance: float = 25
    covariance: float = 1

    def __post_init__(self) -> None:
        for name in ("invariance", "variance", "covariance"):
            within(name, getattr(self, name), 0, 1e6)


class VICReg(Method):
    """VICReg: three weighted terms on the projector's output."""

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder)
        self.projector = mlp(encoder.dimension, options.hidden, options.hidden, options.projection, hidden_bias=True)
        self.weights = options.invariance, options.variance, options.covariance

    def forward(self, views: Tensor) -> Tensor:
        z1, z2 = self.project(self.encoder(views)).chunk(2)
        return vicreg(z1, z2, *self.weights)

    def trivial_loss(self, images: int) -> float:
        """0.99 x `variance`: the views agree and nothing is correlated, but no dimension has the deviation of 1."""
        return 0.99 * self.weights[1]
