r"""VICReg: agree, keep every dimension's deviation above 1, decorrelate dimensions (Bardes et al., ICLR 2022).

L = lambda s(Z, Z') + mu [v(Z) + v(Z')] + nu [c(Z) + c(Z')]                                       (equation 6)
s = mean (z - z')^2,   v = mean_j max(0, 1 - sqrt(Var(z_j) + 1e-4)),   c = 1/d sum_{i != j} Cov(Z)_ij^2
"""

from torch import Tensor
from torch.nn import functional as F

from models.backbones.resnet import ResNet
from models.heads import mlp
from training.distributed import all_reduce
from training.methods.base import Method, within


def spread(z: Tensor) -> tuple[Tensor, Tensor]:
    """v and c of equation 6 on the joint batch of all processes: (n, d) -> scalars; n - 1 in the denominator."""
    rows = all_reduce(z.new_tensor(float(len(z))))
    centred = z - all_reduce(z.sum(0)) / rows
    covariance = all_reduce(centred.T @ centred) / (rows - 1)
    variance = covariance.diagonal()
    hinge = F.relu(1 - (variance + 1e-4).sqrt()).mean()
    return hinge, (covariance.square().sum() - variance.square().sum()) / z.shape[1]


def vicreg(z1: Tensor, z2: Tensor, invariance: float = 25, variance: float = 25, covariance: float = 1) -> Tensor:
    """(n, d), (n, d) -> scalar. The hinge is averaged over the two views and the covariance summed, as released."""
    (v1, c1), (v2, c2) = spread(z1), spread(z2)
    return invariance * F.mse_loss(z1, z2) + variance * (v1 + v2) / 2 + covariance * (c1 + c2)


class VICReg(Method):
    """Published: projector 8192-8192-8192, weights 25, 25 and 1; LARS 0.2 x batch/256, weight decay 1e-6. The widths
    here are solo-learn's for CIFAR-10."""

    def __init__(
        self,
        encoder: ResNet,
        *,
        projection: int = 2048,
        hidden: int = 2048,
        invariance: float = 25,
        variance: float = 25,
        covariance: float = 1,
    ) -> None:
        super().__init__(encoder)
        for name, weight in (("invariance", invariance), ("variance", variance), ("covariance", covariance)):
            within(name, weight, 0, 1e6)
        self.weights = invariance, variance, covariance
        self.projector = mlp(encoder.dimension, hidden, hidden, projection, hidden_bias=True)

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return vicreg(a, b, *self.weights)
