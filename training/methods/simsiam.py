r"""SimSiam: BYOL without the slow copy: the stop-gradient alone prevents collapse (Chen & He, CVPR 2021).

D(p, z) = -cos(p, z),   L = D(p_1, sg(z_2))/2 + D(p_2, sg(z_1))/2                                (equations 1 to 3)
"""

from typing import Unpack

from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.resnet import ResNet
from models.heads import mlp
from training.methods.base import within
from training.methods.predictive import Predictive, Switches
from training.methods.predictor import LinearPredictor


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """-cos(prediction, target), averaged over rows: (n, d), (n, d) -> scalar in [-1, 1]."""
    return -F.cosine_similarity(prediction, target, dim=1).mean()


class SimSiam(Predictive):
    """Published: projector of 2048s ending in a BatchNorm without scale and shift, 3 `layers` on ImageNet and 2 on
    CIFAR-10 (appendix D); predictor 2048-512-2048 at a constant learning rate. SGD 0.05 x batch/256, weight decay
    1e-4 (CIFAR-10: 0.03, 5e-4). A `momentum` gives it BYOL's slow copy back.
    """

    def __init__(
        self,
        encoder: ResNet,
        *,
        projection: int = 2048,
        bottleneck: int = 512,
        layers: int = 2,
        predictor: bool = True,
        linear_predictor: bool = False,
        symmetric: bool = False,
        **switches: Unpack[Switches],
    ) -> None:
        within("layers", layers, 1, 16)
        if symmetric and not (predictor and linear_predictor):
            raise ValueError("symmetric is true without a linear predictor; set linear_predictor too")
        head = mlp(encoder.dimension, *[projection] * layers, final_norm=True)
        guess: nn.Module = nn.Identity()
        if predictor and linear_predictor:
            guess = LinearPredictor(projection, symmetric=symmetric)
        elif predictor:
            guess = mlp(projection, bottleneck, projection, final_bias=True)
        chosen: Switches = {"momentum": None, "constant_predictor_lr": True, **switches}
        super().__init__(encoder, head, guess, **chosen)

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return negative_cosine(a, b)
