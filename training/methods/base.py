"""What every method is: an encoder, a loss over two views, and something to do after each optimiser step."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import NotRequired, TypedDict

import torch
from torch import Tensor, nn

from models.backbones import ResNet


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


def widen(z: Tensor) -> Tensor:
    """bfloat16 or float16 -> float32, what losses are given; wider floats as they are.

    Inside autocast a product of float32 matrices is in bfloat16 still: InfoNCE's similarities are.
    """
    return z.to(torch.promote_types(z.dtype, torch.float32))


class Method(nn.Module, ABC):
    """A self-supervised method around an encoder.

    `forward` takes both views of n images concatenated, (2n, c, h, w), because one pass over 2n images is faster than
    two over n and gives BatchNorm the statistics of both views; row i and row n + i are views of the same image.
    """

    projector: nn.Module

    def __init__(self, encoder: ResNet) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Identity()

    @abstractmethod
    def forward(self, views: Tensor) -> Tensor:
        """(2n, c, h, w) views -> the scalar loss."""

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
