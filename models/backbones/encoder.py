"""What every backbone is: a module from images to representations that knows their dimension."""

from torch import nn


class Encoder(nn.Module):
    """(n, in_channels, height, width) float images -> (n, dimension) float representations."""

    dimension: int
