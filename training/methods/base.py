"""What every method is: an encoder, a loss over two views, and something to do after each optimiser step."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from models.backbones import ResNet


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
