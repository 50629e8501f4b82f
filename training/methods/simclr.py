r"""SimCLR: agree with your other view, disagree with every other image (Chen et al., ICML 2020).

    l(i, j) = -log [ exp(sim(z_i, z_j)/tau) / sum_{k != i} exp(sim(z_i, z_k)/tau) ],   sim the cosine      (equation 1)

averaged over the 2n rows i of a batch with j the other view of i's image.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.resnet import ResNet
from models.heads import Diagonal, Fixed, low_rank, mlp, orthogonal
from training.distributed import gather
from training.methods.base import Method, within

Projector = Literal["mlp", "linear", "none", "orthogonal", "diagonal", "low-rank"]


def nt_xent(z1: Tensor, z2: Tensor, temperature: float) -> Tensor:
    """The normalised temperature-scaled cross entropy, equation 1: (n, d), (n, d) -> scalar.

    Each of the 2n rows has its other view as the positive and the remaining 2n - 2 rows as negatives.
    """
    z = F.normalize(torch.cat([z1, z2]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    n = len(z1)
    positives = torch.arange(2 * n, device=z.device).roll(n)
    return F.cross_entropy(logits, positives)


class SimCLR(Method):
    """Published: projector d-d-128; temperature 0.5 on CIFAR-10 (appendix B.9), 0.1 on ImageNet (table 5).

    `projector` turns on the ablations of table 2 of DirectCLR's paper (Jing et al., ICLR 2022): none, one trainable
    linear layer, fixed orthogonal (the cosine cannot see it: `none` again), trainable diagonal, and fixed of `rank`.
    """

    def __init__(
        self,
        encoder: ResNet,
        *,
        projector: Projector = "mlp",
        projection: int = 128,
        hidden: int | None = None,
        rank: int | None = None,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(encoder)
        within("temperature", temperature, 1e-3, 1e3)
        d, self.temperature = encoder.dimension, temperature
        rank = max(1, d * 360 // 2048) if rank is None else rank
        within("rank", rank, 1, d)
        heads: dict[str, Callable[[], nn.Module]] = {
            "mlp": lambda: mlp(d, hidden or d, projection),
            "linear": lambda: mlp(d, projection),
            "none": lambda: nn.Identity(),
            "orthogonal": lambda: Fixed(orthogonal(d)),
            "diagonal": lambda: Diagonal(d),
            "low-rank": lambda: Fixed(low_rank(d, rank)),
        }
        if projector not in heads:
            raise ValueError(f"projector is {projector!r}; it must be one of {', '.join(heads)}")
        self.projector: nn.Module = heads[projector]()

    def loss(self, a: Tensor, b: Tensor) -> Tensor:
        return nt_xent(gather(a), gather(b), self.temperature)
