# mypy: ignore-errors
"""A ResNet of torchvision's at any width, which other libraries' layouts name anew."""

from typing import Any

import torch
from cases.common import Scale, lively
from torch import Tensor, nn


def resnet(
    scale: Scale, kind: str = "bottleneck", layers: tuple[int, ...] = (3, 4, 6, 3), width: int = 64, **options: Any
) -> nn.Module:
    """torchvision's ResNet, at any width: `width` replaces its 64."""
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    class Widened(ResNet):
        def _make_layer(
            self, block: Any, planes: int, blocks: int, stride: int = 1, dilate: bool = False
        ) -> nn.Sequential:
            if planes == 64 and width != 64:
                self.conv1 = nn.Conv2d(3, width, kernel_size=7, stride=2, padding=3, bias=False)
                self.bn1, self.inplanes = nn.BatchNorm2d(width), width
            return super()._make_layer(block, planes * width // 64, blocks, stride, dilate)

    model = Widened(Bottleneck if kind == "bottleneck" else BasicBlock, list(layers), **options)
    model.fc = nn.Identity()
    return lively(model)


def with_fc(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    width = state["layer4.0.bn2.weight"].shape[0]
    return {**state, "fc.weight": torch.randn(5, width), "fc.bias": torch.zeros(5)}
