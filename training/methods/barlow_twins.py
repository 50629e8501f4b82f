r"""Barlow Twins: make the views' cross-correlation matrix the identity (Zbontar et al., ICML 2021).

L = sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2,   C_ij = E_b[z^A_bi z^B_bj], each z_.i standardised (equation 1)
"""

from dataclasses import dataclass

from torch import Tensor

from models.heads import mlp
from training.distributed import all_reduce
from training.methods.base import Encoder, Method, wide, within


def standardise(z: Tensor, epsilon: float = 1e-5) -> tuple[Tensor, Tensor]:
    """Standardise each dimension of z (n, d) over the joint batch. Also returns the joint batch's number of rows, ().

    `epsilon` is added to the variance, as in the authors' BatchNorm, so that a constant dimension gives 0, not NaN.
    """
    rows = all_reduce(z.new_tensor(float(len(z))))
    centred = z - all_reduce(z.sum(0)) / rows
    variance = all_reduce(centred.square().sum(0)) / rows
    return centred * (variance + epsilon).rsqrt(), rows


@wide
def barlow_twins(z1: Tensor, z2: Tensor, redundancy: float) -> Tensor:
    """Equation 1 on the joint batch of all processes: (n, d), (n, d) -> scalar; `redundancy` is lambda."""
    a, rows = standardise(z1)
    b, _ = standardise(z2)
    correlation = all_reduce(a.T @ b) / rows
    on = (1 - correlation.diagonal()).square().sum()
    return on + redundancy * (correlation.square().sum() - correlation.diagonal().square().sum())


@dataclass(frozen=True, kw_only=True)
class Options:
    """Published: projector 8192-8192-8192, lambda 0.0051, the loss as it is; LARS 0.2 x batch/256, 0.0048 for biases
    and BatchNorm, weight decay 1e-6. The defaults are solo-learn's for CIFAR-10: 2048s, and the loss times 0.1.
    """

    projection: int = 2048
    hidden: int = 2048
    redundancy: float = 0.0051
    scale: float = 0.1

    def __post_init__(self) -> None:
        within("redundancy", self.redundancy, 0, 1e3)
        within("scale", self.scale, 0, 1e6)


class BarlowTwins(Method):
    """Barlow Twins compares the projector's output across views, dimension by dimension, and never row with row."""

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder)
        self.projector = mlp(encoder.dimension, options.hidden, options.hidden, options.projection)
        self.redundancy = options.redundancy
        self.scale = options.scale
        self.width = options.projection

    def forward(self, views: Tensor) -> Tensor:
        z1, z2 = self.project(self.encoder(views)).chunk(2)
        return self.scale * barlow_twins(z1, z2, self.redundancy)

    def trivial_loss(self, images: int) -> float:
        """scale x d: rows that are all alike correlate with nothing, so that every C_ii is 0."""
        return self.scale * self.width
