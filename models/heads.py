"""Training heads: what sits behind the representation while training and is thrown away afterwards."""

from itertools import pairwise

from torch import nn


def mlp(*widths: int, final_bias: bool = False) -> nn.Sequential:
    """Linear layers of the given widths with BatchNorm and ReLU between them: (n, widths[0]) -> (n, widths[-1]).

    Two widths make a single linear layer. The last layer has no normalisation (BYOL, Grill et al. 2020, sec. 3.3).
    """
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(inplace=True)]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=final_bias))
