"""Computes convolutions of feature maps of a few pixels as one matrix product, which is several times faster on a CPU.

The last stage of a ResNet sees 2x2 maps of a 28 or 32 pixel image behind a stem of stride 2. A 3x3 kernel on such a
map mostly multiplies padding, and the library's gradient for its weights is slow there. Written as a linear map from
all pixels of the input to all pixels of the output it is exact and dense:

    y[(i, j), o] = sum over (a, b), c of x[(a, b), c] W[(a, b, c), (i, j, o)],   W = w[o, c, a + p - s i, b + p - s j]

with p the padding and s the stride, and W = 0 where the kernel does not reach.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUTS, INPUTS = 4, 16
"""Most pixels of a map that is worth it: beyond, W is mostly zeros."""


class SmallMapConv2d(nn.Conv2d):
    """A Conv2d with the same parameter names that uses the matrix product if the map is small enough.

    It supports square kernels, strides and paddings, without dilation or groups. It supports a bias, since an engine
    that folds a BatchNorm into a copy of the layer gives it one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(n, in_channels, h, w) -> (n, out_channels, h', w'), channels last."""
        n, c, h, w = x.shape
        kernel = self.kernel_size[0]
        stride = self.stride[0]
        padding = int(self.padding[0])
        rows, columns = ((side + 2 * padding - kernel) // stride + 1 for side in (h, w))
        if rows * columns > OUTPUTS or h * w > INPUTS:
            return super().forward(x)
        flat = x.permute(0, 2, 3, 1).reshape(n, h * w * c)
        bias = None if self.bias is None else self.bias.repeat(rows * columns)
        y = F.linear(flat, self.matrix(h, w, rows, columns), bias)
        return y.view(n, rows, columns, self.out_channels).permute(0, 3, 1, 2)

    def matrix(self, h: int, w: int, rows: int, columns: int) -> Tensor:
        """(rows * columns * out_channels, h * w * in_channels): W, transposed, from the kernel; differentiable."""
        kernel = self.kernel_size[0]
        stride = self.stride[0]
        padding = int(self.padding[0])
        # The gradient of unbind is one stack. A view of each tap would have a gradient of the whole kernel's size.
        taps = self.weight.flatten(2).unbind(2)
        nothing = torch.zeros_like(taps[0])
        lines = []
        for i, j in ((i, j) for i in range(rows) for j in range(columns)):
            reach = [(a + padding - stride * i, b + padding - stride * j) for a in range(h) for b in range(w)]
            inside = [0 <= a < kernel and 0 <= b < kernel for a, b in reach]  # where in the kernel each pixel falls
            blocks = [taps[a * kernel + b] if has else nothing for (a, b), has in zip(reach, inside, strict=True)]
            lines.append(torch.cat(blocks, dim=1))
        return torch.cat(lines, dim=0)


def quicken(module: nn.Module) -> None:
    """Replace, in place, every convolution in `module` that can be a SmallMapConv2d. Weights are shared."""
    for parent in module.modules():
        for name, child in parent.named_children():
            if type(child) is nn.Conv2d and _fits(child):
                quick = SmallMapConv2d(
                    child.in_channels,
                    child.out_channels,
                    child.kernel_size[0],
                    child.stride[0],
                    child.padding[0],
                    bias=False,
                    device="meta",
                )
                quick.weight = child.weight
                quick.train(child.training)
                setattr(parent, name, quick)


def _fits(layer: nn.Conv2d) -> bool:
    square = all(len(set(pair)) == 1 for pair in (layer.kernel_size, layer.stride, layer.padding))
    plain = layer.bias is None and layer.groups == 1 and set(layer.dilation) == {1} and layer.padding_mode == "zeros"
    return square and plain and layer.kernel_size[0] > 1 and not isinstance(layer.padding, str)
