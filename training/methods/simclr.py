r"""SimCLR: agree with your other view, disagree with every other image (Chen et al., ICML 2020).

    l(i, j) = -log [ exp(sim(z_i, z_j)/tau) / sum_{k != i} exp(sim(z_i, z_k)/tau) ],   sim the cosine      (equation 1)

averaged over the 2n rows i of a batch with j the other view of i's image.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.heads import Diagonal, FinalNorm, Fixed, low_rank, mlp, orthogonal
from training.distributed import gather
from training.methods.base import Encoder, Method, wide, within

Projector = Literal["mlp", "linear", "none", "orthogonal", "diagonal", "low-rank"]


@wide
def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross entropy, equation 1, on the joint batch: (n, d), (n, d) -> scalar.

    Each of the 2n rows has its other view as the positive and the remaining 2n - 2 rows as negatives.
    """
    z = F.normalize(torch.cat([gather(z1), gather(z2)]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    positives = torch.arange(len(z), device=z.device).roll(len(z) // 2)
    return F.cross_entropy(logits, positives)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Published: projector d-d-128; temperature 0.5 on CIFAR-10 (appendix B.9), 0.1 on ImageNet (table 5)."""

    projector: Projector = "mlp"
    projection: int = 128
    hidden: int | None = None
    """None: the representation's dimension."""
    final_norm: bool = False
    """End the projector in a BatchNorm that learns a scale and no shift, as Google's code does."""
    rank: int | None = None
    """Rank of the low-rank projector; None is DirectCLR's share, 360 of 2048."""
    temperature: float = 0.5

    def __post_init__(self) -> None:
        within("temperature", self.temperature, 1e-3, 1e3)


class SimCLR(Method):
    """SimCLR. `projector` selects an ablation of table 2 of DirectCLR's paper (Jing et al., ICLR 2022).

    They are none, one trainable linear layer, fixed orthogonal (which does not change a cosine, so it equals none),
    trainable diagonal, and fixed of low `rank`.
    """

    def __init__(self, encoder: Encoder, options: Options) -> None:
        super().__init__(encoder)
        d = encoder.dimension
        norm: FinalNorm = "scaled" if options.final_norm else "none"
        self.temperature = options.temperature
        rank = max(1, d * 360 // 2048) if options.rank is None else options.rank
        within("rank", rank, 1, d)
        heads: dict[str, Callable[[], nn.Module]] = {
            "mlp": lambda: mlp(d, options.hidden or d, options.projection, final_norm=norm),
            "linear": lambda: mlp(d, options.projection, final_norm=norm),
            "none": lambda: nn.Identity(),
            "orthogonal": lambda: Fixed(orthogonal(d)),
            "diagonal": lambda: Diagonal(d),
            "low-rank": lambda: Fixed(low_rank(d, rank)),
        }
        if options.projector not in heads:
            raise ValueError(f"projector is {options.projector!r}; it must be one of {', '.join(heads)}")
        self.projector = heads[options.projector]()

    def forward(self, views: Tensor) -> Tensor:
        z1, z2 = self.project(self.encoder(views)).chunk(2)
        return nt_xent(z1, z2, self.temperature)

    def trivial_loss(self, images: int) -> float:
        """ln(2n - 1): the positive is one of 2n - 1 rows that are all alike."""
        return math.log(2 * images - 1)
