"""The base class of every backbone: a module that turns images into representations of a known dimension."""

from torch import nn


class Encoder(nn.Module):
    """(n, in_channels, height, width) float images -> (n, dimension) float representations."""

    dimension: int
