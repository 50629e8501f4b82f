"""An encoder in bfloat16 on a CPU: float32 where rounding would cost most, and weights laid out once for oneDNN.

The convolution that sees the pixels stays in float32. It is a small part of the work, and most of what bfloat16 does to
an embedding would come from it. PyTorch keeps the other weights in its own layout, and oneDNN copies them into another
at every pass. For one small image that copying is 40 % of the pass. The operators used here are those of PyTorch's own
compiler for frozen weights.
"""

import copy

import torch
from torch import Tensor, nn


class PackedConv2d(nn.Module):
    """What the convolution `plain`, in bfloat16, does, from weights in oneDNN's layout."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self._bias = plain.bias
        self._places = (list(plain.padding), list(plain.stride), list(plain.dilation), plain.groups)
        self._weight = torch._C._nn.mkldnn_reorder_conv2d_weight(plain.weight.detach().to_mkldnn(), *self._places)

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self._weight, self._bias, *self._places, "none", [], ""
        )
        return maps


class Stem(nn.Module):
    """The first convolution, of float32 images (n, c, h, w) in float32, to maps in bfloat16."""

    def __init__(self, plain: nn.Conv2d) -> None:
        super().__init__()
        self._plain = plain

    def forward(self, x: Tensor) -> Tensor:
        maps: Tensor = self._plain(x.float())
        return maps.to(torch.bfloat16)


@torch.no_grad()
def to_bfloat16(encoder: nn.Module) -> bool:
    """Change the encoder in place. True if it takes float32 images from now on: it begins with a convolution."""
    convolutions = [(name, it) for name, it in encoder.named_modules() if type(it) is nn.Conv2d]
    first = [copy.deepcopy(it) for _, it in convolutions[:1]]
    encoder.to(torch.bfloat16)
    for exact, (name, _) in zip(first, convolutions, strict=False):
        encoder.set_submodule(name, Stem(exact))
    if hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight") and torch._C._has_mkldnn:
        for name, it in convolutions[1:]:
            if it.padding_mode == "zeros" and not isinstance(it.padding, str):
                encoder.set_submodule(name, PackedConv2d(it))
    return bool(first)
