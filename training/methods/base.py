"""What every method is: an encoder, a loss over two views, and something to do after each optimiser step."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from models.backbones.resnet import ResNet


class ParameterGroup(TypedDict):
    """Parameters that one set of optimiser settings applies to."""

    params: list[nn.Parameter]
    lr_scale: NotRequired[float]
    """Multiplies the run's learning rate; 1 if absent."""
    constant_lr: NotRequired[bool]
    """Keep the learning rate at its peak after the warm-up (SimSiam's predictor); false if absent."""
    weight_decay: NotRequired[float]
    """Replaces the run's weight decay."""


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def within(name: str, value: float, low: float, high: float) -> None:
    """ValueError, naming the option, unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low:g} and {high:g}")


class Method(nn.Module, ABC):
    """A self-supervised method around an encoder: `pair` makes two sets of rows of the views, `loss` compares them.

    `forward` takes both views of n images concatenated, (2n, c, h, w), because one pass over 2n images is faster than
    two over n and gives BatchNorm the statistics of both views; row i and row n + i are views of the same image.
    """

    projector: nn.Module

    def __init__(self, encoder: ResNet) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Identity()

    def forward(self, views: Tensor) -> Tensor:
        """(2n, c, h, w) views -> the scalar loss, in float32 or wider whatever autocast does to the encoder: bfloat16
        has three digits, and a similarity over a temperature of 0.1 is as large as ten."""
        a, b = (z.to(torch.promote_types(z.dtype, torch.float32)) for z in self.pair(views))
        with torch.autocast(views.device.type, enabled=False):
            return self.loss(a, b)

    def pair(self, views: Tensor) -> tuple[Tensor, Tensor]:
        """(2n, c, h, w) views -> what the loss compares, row by row: here each view's projections, (n, k) both."""
        z1, z2 = self.project(self.encoder(views)).chunk(2)
        return z1, z2

    @abstractmethod
    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        """The scalar loss of what `pair` returns."""

    def project(self, h: Tensor) -> Tensor:
        """(n, dimension) representations -> what the loss sees, (n, k): the projector's output."""
        projected: Tensor = self.projector(h)
        return projected

    def step(self, progress: float) -> None:
        """Called after every optimiser step, with progress through the run in [0, 1]."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """What the optimiser trains, every trainable parameter in exactly one group."""
        return [{"params": trainable(self.parameters())}]

    def watch(self) -> dict[str, list[float] | float]:
        """What this method adds to an epoch's log record; finite numbers only."""
        return {}
