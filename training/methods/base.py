"""The base class of methods: an encoder, a loss over two views, and a hook after each optimiser step."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, NotRequired, TypedDict

import torch
from torch import Tensor, nn

from models.backbones import Encoder

__all__ = ["Encoder", "Method", "ParameterGroup", "trainable", "wide", "within"]


class ParameterGroup(TypedDict):
    """A group of parameters with the same optimiser settings."""

    params: list[nn.Parameter]
    lr_scale: NotRequired[float]
    """Multiplies the run's learning rate; 1 if absent."""
    constant_lr: NotRequired[bool]
    """Keep the learning rate at its peak after the warm-up (SimSiam's predictor); false if absent."""
    weight_decay: NotRequired[float]
    """Replaces the run's weight decay."""


class Method(nn.Module, ABC):
    """A self-supervised method around an encoder: `forward(views)` is the loss, `step(progress)` what follows it.

    A subclass takes the encoder and a frozen dataclass of options, whose fields are what `--option` sets, and sets
    `projector` if it has one. It may draw from torch's global generator, which is seeded before each step: a resumed
    run draws the same.
    """

    projector: nn.Module

    def __init__(self, encoder: Encoder, options: Any = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = nn.Identity()

    @abstractmethod
    def forward(self, views: Tensor) -> Tensor:
        """(2n, c, h, w) views -> the scalar loss. Rows i and n + i are views of the same image.

        Both views come in one batch: one pass over 2n images is faster than two over n, and BatchNorm covers both.
        """

    def project(self, h: Tensor) -> Tensor:
        """Representations (n, dimension) -> the projector's output (n, k), on which the loss is computed."""
        projected: Tensor = self.projector(h)
        return projected

    def step(self, progress: float) -> None:
        """Called after every optimiser step, with progress through the run in [0, 1]."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """The optimiser's parameter groups. Every trainable parameter is in exactly one of them."""
        return [{"params": trainable(self.parameters())}]

    def trivial_loss(self, images: int) -> float | None:
        """The loss of a batch of `images` images if the encoder gives each the same row; None if unknown.

        A run whose loss stays at this value has learnt nothing or has collapsed.
        """
        return None

    def watch(self) -> dict[str, list[float] | float]:
        """Entries that this method adds to an epoch's log record. All numbers must be finite."""
        return {}


def wide(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A decorator that computes a loss in float32 or wider, even if autocast runs the encoder in a half format.

    bfloat16 has three digits, and a similarity divided by a temperature of 0.1 can be as large as ten.
    """

    @wraps(loss)
    def widened(*rows: Tensor, **settings: Any) -> Tensor:
        device = next(x.device.type for x in rows if isinstance(x, Tensor))
        widest = [x.to(torch.promote_types(x.dtype, torch.float32)) if isinstance(x, Tensor) else x for x in rows]
        with torch.autocast(device, enabled=False):
            return loss(*widest, **settings)

    return widened


def trainable(parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
    return [p for p in parameters if p.requires_grad]


def within(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError, naming the option, unless low <= value <= high."""
    if not low <= value <= high:
        raise ValueError(f"{name} is {value}; it must lie between {low:g} and {high:g}")
