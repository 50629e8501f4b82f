"""Training heads: layers after the representation that only training uses and that are not exported."""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FinalNorm = Literal["none", "plain", "scaled"]


def mlp(
    *widths: int,
    hidden_bias: bool = False,
    final_bias: bool = False,
    affine: bool = True,
    final_norm: FinalNorm = "none",
) -> nn.Sequential:
    """Linear layers of the given widths with BatchNorm and ReLU between them: (n, widths[0]) -> (n, widths[-1]).

    Two widths make a single linear layer. The last layer has no normalisation (BYOL, Grill et al. 2020, sec. 3.3)
    unless `final_norm` adds a BatchNorm: a plain one, without scale and shift (SimSiam, Chen & He 2021), or one with a
    scale alone (SimCLR's code). `affine` says whether the hidden BatchNorms have both.
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs, bias=hidden_bias)]
        layers += [nn.BatchNorm1d(outputs, affine=affine), nn.ReLU(inplace=True)]
    layers.append(nn.Linear(widths[-2], widths[-1], bias=final_bias))
    if final_norm != "none":
        norm = nn.BatchNorm1d(widths[-1], affine=final_norm == "scaled")
        if norm.affine:
            norm.bias.requires_grad_(False)  # it stays at 0
        layers.append(norm)
    return nn.Sequential(*layers)


class Diagonal(nn.Module):
    """A trainable scale for each dimension, initially 1: (n, d) -> (n, d).

    The parameter has shape (1, d), so that optimisers treat it as a weight matrix and not as a bias.
    """

    def __init__(self, dimension: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, dimension))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale


class Fixed(nn.Module):
    """A fixed linear map, which is not trained: (n, d) -> (n, k) by a (k, d) matrix."""

    matrix: Tensor

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, h: Tensor) -> Tensor:
        return F.linear(h, self.matrix)


def orthogonal(dimension: int) -> Tensor:
    """A random orthogonal matrix (d, d), uniform over the orthogonal group. Uses torch's global generator."""
    return nn.init.orthogonal_(torch.empty(dimension, dimension))


def low_rank(dimension: int, rank: int) -> Tensor:
    """A random matrix (d, d) with `rank` singular values of 1 and the rest 0, between two random orthogonal bases."""
    return orthogonal(dimension)[:, :rank] @ orthogonal(dimension)[:rank]
