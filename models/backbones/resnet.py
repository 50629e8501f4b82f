"""ResNet encoders: image -> representation.

Parameter names are torchvision's, so that published ResNet weights load (minus their classifier, which an encoder
does not have). Two things are added: any width, and stems for small images, 3x3 at stride 1 or, for a quarter of the
arithmetic, stride 2.

Source: He et al., Deep Residual Learning (CVPR 2016); the 3x3 stem is SimCLR's for CIFAR (Chen et al. 2020, B.9);
solo-learn pads it by 2 (`3x3+2`). Wide: Zagoruyko & Komodakis 2016; groups: Xie et al., ResNeXt (CVPR 2017).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.backbones.encoder import Encoder

Name = Literal["resnet18", "resnet34", "resnet26", "resnet50", "resnet101", "resnet152", "resnet200"]
Stem = Literal["3x3", "3x3+2", "3x3/2", "7x7"]


def conv3x3(inputs: int, outputs: int, stride: int = 1, groups: int = 1, padding: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=3, stride=stride, padding=padding, groups=groups, bias=False)


def conv1x1(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel_size=1, stride=stride, bias=False)


class Block(nn.Module):
    """A residual block. Its shortcut is a 1x1 convolution where the shape changes."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__()
        outputs = planes * self.expansion
        self.downsample: nn.Module | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(conv1x1(inputs, outputs, stride), nn.BatchNorm2d(outputs))

    def shortcut(self, x: Tensor) -> Tensor:
        return x if self.downsample is None else self.downsample(x)


class BasicBlock(Block):
    def __init__(self, inputs: int, planes: int, stride: int) -> None:
        super().__init__(inputs, planes, stride)
        self.conv1 = conv3x3(inputs, planes, stride)
        self.bn1 = nn.BatchNorm2d(planes)
        self.conv2 = conv3x3(planes, planes)
        self.bn2 = nn.BatchNorm2d(planes)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class Bottleneck(Block):
    expansion = 4

    def __init__(
        self, inputs: int, planes: int, stride: int, wide: int = 1, groups: int = 1, stride_first: bool = False
    ) -> None:
        super().__init__(inputs, planes, stride)
        inner = planes * wide
        first, second = (stride, 1) if stride_first else (1, stride)
        self.conv1 = conv1x1(inputs, inner, first)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = conv3x3(inner, inner, second, groups)
        self.bn2 = nn.BatchNorm2d(inner)
        self.conv3 = conv1x1(inner, planes * 4)
        self.bn3 = nn.BatchNorm2d(planes * 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x), inplace=True)


LAYOUTS: dict[Name, tuple[type[BasicBlock] | type[Bottleneck], Sequence[int]]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2)),
    "resnet34": (BasicBlock, (3, 4, 6, 3)),
    "resnet26": (Bottleneck, (2, 2, 2, 2)),
    "resnet50": (Bottleneck, (3, 4, 6, 3)),
    "resnet101": (Bottleneck, (3, 4, 23, 3)),
    "resnet152": (Bottleneck, (3, 8, 36, 3)),
    "resnet200": (Bottleneck, (3, 24, 36, 3)),
}


class ResNet(Encoder):
    """(n, in_channels, height, width) float images -> (n, dimension) representations, after global average pooling.

    dimension is 8 * width for resnet18 and resnet34, and 32 * width for the deeper ones, whose blocks are bottlenecks.
    Only bottlenecks have `wide`, `groups` and `stride_first`. `wide` is the factor by which the 3x3 convolutions are
    wider, and `groups` the number of their groups. `stride_first` puts the stride in the first convolution, as in the
    paper, instead of the 3x3 one, as is usual. Without `stem_relu` no ReLU follows the stem, as in lightly's CIFAR
    benchmarks.
    """

    def __init__(
        self,
        name: Name,
        *,
        width: int = 64,
        in_channels: int = 3,
        stem: Stem = "7x7",
        wide: int = 1,
        groups: int = 1,
        stride_first: bool = False,
        stem_relu: bool = True,
    ) -> None:
        super().__init__()
        self.stem_relu = stem_relu
        block, depths = LAYOUTS[name]
        extra: dict[str, Any] = {}
        if block is Bottleneck:
            extra = {"wide": wide, "groups": groups, "stride_first": stride_first}
        elif wide != 1 or groups != 1 or stride_first:
            raise ValueError(f"{name} has no bottlenecks, whose wide, groups and stride_first are")
        if stem == "7x7":
            self.conv1 = nn.Conv2d(in_channels, width, kernel_size=7, stride=2, padding=3, bias=False)
            self.maxpool: nn.Module = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
        else:
            self.conv1 = conv3x3(
                in_channels, width, stride=2 if stem == "3x3/2" else 1, padding=2 if stem == "3x3+2" else 1
            )
            self.maxpool = nn.Identity()
        self.bn1 = nn.BatchNorm2d(width)
        channels = width
        for index, depth in enumerate(depths):
            planes = width * 2**index
            blocks: list[nn.Module] = []
            for position in range(depth):
                blocks.append(block(channels, planes, 2 if position == 0 and index > 0 else 1, **extra))
                channels = planes * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*blocks))
        self.dimension = channels
        for module in self.modules():
            # The meta device has no values to initialise, and trying to would import torch's compiler.
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x))
        x = self.maxpool(F.relu(x, inplace=True) if self.stem_relu else x)
        for name in ("layer1", "layer2", "layer3", "layer4"):
            x = self.get_submodule(name)(x)
        return torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)
