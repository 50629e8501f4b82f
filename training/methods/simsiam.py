r"""SimSiam: BYOL without the slow copy: the stop-gradient alone prevents collapse (Chen & He, CVPR 2021).

D(p, z) = -cos(p, z),   L = D(p_1, sg(z_2))/2 + D(p_2, sg(z_1))/2                                (equations 1 to 3)
"""

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from models.heads import mlp
from training.methods.base import Encoder, wide, within
from training.methods.predictive import Predictive, Switches, target_of
from training.methods.predictor import LinearPredictor, MLPPredictor, NoPredictor, Predictor


@wide
def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos(prediction, target), averaged over rows: (n, d), (n, d) -> scalar in [-1, 1]."""
    return -F.cosine_similarity(prediction, target, dim=1).mean()


@dataclass(frozen=True, kw_only=True)
class Options(Switches):
    """Published: projector of 2048s ending in a BatchNorm without scale and shift, 3 `layers` on ImageNet and 2 on
    CIFAR-10 (appendix D); predictor 2048-512-2048 at a constant learning rate. SGD 0.05 x batch/256, weight decay
    1e-4 (CIFAR-10: 0.03, 5e-4). A `momentum` gives it BYOL's slow copy back.
    """

    projection: int = 2048
    bottleneck: int = 512
    layers: int = 2
    projector: bool = True
    predictor: bool = True
    linear_predictor: bool = False
    symmetric: bool = False
    constant_predictor_lr: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        within("layers", self.layers, 1, 16)
        if self.symmetric and not (self.predictor and self.linear_predictor):
            raise ValueError("symmetric is true without a linear predictor; set linear_predictor too")


class SimSiam(Predictive):
    """SimSiam. `predictor=False` or `stop_gradient=False` make it collapse; `projector=False` exposes h to collapse."""

    cost = staticmethod(negative_cosine)
    least = -1.0

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder, options)
        width = encoder.dimension
        if options.projector:
            width = options.projection
            self.projector = mlp(encoder.dimension, *[width] * options.layers, final_norm="plain")
        self.predictor = predictor_of(width, options)
        self.target = target_of(encoder, self.projector, options)


def predictor_of(width: int, options: Options) -> Predictor:
    if not options.predictor:
        return NoPredictor()
    if options.linear_predictor:
        return LinearPredictor(width, symmetric=options.symmetric)
    return MLPPredictor(width, options.bottleneck, final_bias=True)
