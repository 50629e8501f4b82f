"""A linear predictor that is computed, not trained: what DirectPred and DirectCopy share."""

from abc import abstractmethod
from typing import Unpack

import torch
from torch import Tensor

from models.backbones.resnet import ResNet
from models.heads import mlp
from training.methods.base import within
from training.methods.predictive import Predictive, Switches
from training.methods.predictor import LinearPredictor


class ClosedForm(Predictive):
    """A linear predictor that is set every `frequency` steps, after the optimiser's, and trained in between."""

    predictor: LinearPredictor
    steps: Tensor

    def __init__(
        self,
        encoder: ResNet,
        *,
        projection: int = 128,
        hidden: int = 512,
        rho: float = 0.3,
        epsilon: float = 0.1,
        frequency: int = 1,
        **switches: Unpack[Switches],
    ) -> None:
        within("epsilon", epsilon, 0, 1e3)
        within("frequency", frequency, 1, 1e9)
        head = mlp(encoder.dimension, hidden, projection, affine=False)
        predictor = LinearPredictor(projection, rho=rho).requires_grad_(frequency > 1)
        chosen: Switches = {"momentum": 0.996, "constant_momentum": True, **switches}
        super().__init__(encoder, head, predictor, **chosen)
        self.epsilon, self.frequency = epsilon, frequency
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    @abstractmethod
    def solution(self) -> Tensor:
        """(projection, projection): W_p from the predictor's running statistics."""

    @torch.no_grad()
    def step(self, progress: float) -> None:
        self.steps += 1
        if self.steps % self.frequency == 0:
            self.predictor.weight.copy_(self.solution())
        super().step(progress)
