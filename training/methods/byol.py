r"""BYOL: predict a slow copy of yourself across views, with no negatives (Grill et al., NeurIPS 2020).

L = |q(f_1)/|q(f_1)| - sg(t_2)/|t_2||^2 = 2 - 2 cos(q(f_1), sg(t_2)),  and with the views swapped      (equation 2)
tau = 1 - (1 - tau_0)(cos(pi k/K) + 1)/2                                                              (section 3.3)
"""

from dataclasses import dataclass

from models.heads import mlp
from training.methods.base import Encoder
from training.methods.predictive import Predictive, Switches, target_of
from training.methods.predictor import LinearPredictor, MLPPredictor, NoPredictor, Predictor


@dataclass(frozen=True, kw_only=True)
class Options(Switches):
    """Published on ImageNet: projector and predictor d-4096-256; tau_0 0.99 for 300 epochs, 0.996 for 1000; LARS 0.3.
    The defaults are those of solo-learn for CIFAR-10's order of size: tau_0 0.99, smaller heads.
    """

    projection: int = 128
    hidden: int = 512
    projector: bool = True
    predictor: bool = True
    linear_predictor: bool = False
    """One matrix without a bias; its alignment with the correlation matrix is watched."""
    symmetric: bool = False
    """Keep the linear predictor symmetric."""
    momentum: float | None = 0.99

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric and not (self.predictor and self.linear_predictor):
            raise ValueError("symmetric is true without a linear predictor; set linear_predictor too")


class BYOL(Predictive):
    """BYOL. Without the predictor or the stop-gradient (`predictor=False`, `stop_gradient=False`) it collapses.

    A projector shields the representation from most of the projection's collapse; `projector=False` removes it.
    """

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder, options)
        width = encoder.dimension
        if options.projector:
            width = options.projection
            self.projector = mlp(encoder.dimension, options.hidden, width)
        self.predictor = predictor_of(width, options)
        self.target = target_of(encoder, self.projector, options)


def predictor_of(width: int, options: Options) -> Predictor:
    if not options.predictor:
        return NoPredictor()
    if options.linear_predictor:
        return LinearPredictor(width, symmetric=options.symmetric)
    return MLPPredictor(width, options.hidden)
