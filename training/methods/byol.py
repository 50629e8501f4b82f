r"""BYOL: predict a slow copy of yourself across views, with no negatives (Grill et al., NeurIPS 2020).

L = |q(f_1)/|q(f_1)| - sg(t_2)/|t_2||^2 = 2 - 2 cos(q(f_1), sg(t_2)),  and with the views swapped      (equation 2)
tau = 1 - (1 - tau_0)(cos(pi k/K) + 1)/2                                                              (section 3.3)
"""

from typing import Unpack

from torch import nn

from models.backbones.resnet import ResNet
from models.heads import mlp
from training.methods.predictive import Predictive, Switches
from training.methods.predictor import LinearPredictor


class BYOL(Predictive):
    """Published on ImageNet: projector and predictor d-4096-256; tau_0 0.99 for 300 epochs, 0.996 for 1000; LARS 0.3.
    The defaults are those of solo-learn for CIFAR-10's order of size: tau_0 0.99, smaller heads.

    `predictor=False` and `stop_gradient=False` remove what keeps BYOL from collapsing. A projector shields the
    representation from most of the collapse behind it; `projector=False` lets it through. `linear_predictor` is one
    matrix without a bias, which may be kept `symmetric`; its alignment with the correlation matrix is watched.
    """

    def __init__(
        self,
        encoder: ResNet,
        *,
        projection: int = 128,
        hidden: int = 512,
        projector: bool = True,
        predictor: bool = True,
        linear_predictor: bool = False,
        symmetric: bool = False,
        **switches: Unpack[Switches],
    ) -> None:
        if symmetric and not (predictor and linear_predictor):
            raise ValueError("symmetric is true without a linear predictor; set linear_predictor too")
        width = projection if projector else encoder.dimension
        head: nn.Module = mlp(encoder.dimension, hidden, projection) if projector else nn.Identity()
        guess: nn.Module = nn.Identity()
        if predictor:
            guess = LinearPredictor(width, symmetric=symmetric) if linear_predictor else mlp(width, hidden, width)
        chosen: Switches = {"momentum": 0.99, **switches}
        super().__init__(encoder, head, guess, **chosen)
