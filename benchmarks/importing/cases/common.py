# mypy: ignore-errors
"""What the cases share: their register, lively random weights, usual transforms, and projectors to be dropped."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

CASES: dict[str, Callable[["Scale"], "Case"]] = {}
DEPTH = 2  # of a tiny transformer


@dataclass
class Case:
    """transform: a Pillow image -> the model's input; rows: inputs (n, c, s, s) -> (n, d)."""

    source: str
    write: Callable[[Path], None]
    transform: Callable[[Image.Image], Tensor]
    rows: Callable[[Tensor], Tensor]
    module: nn.Module
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Scale:
    tiny: bool

    def of(self, small: int, published: int) -> int:
        return small if self.tiny else published


def case(function: Callable[[Scale], Case]) -> Callable[[Scale], Case]:
    CASES[function.__name__] = function
    return function


def lively(module: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights under which images get different rows, as after training; a fresh ViT maps all to one."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, std: float) -> Tensor:
        return torch.randn(like.shape, generator=generator) * std

    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if not tensor.is_floating_point():
                continue
            if name.endswith("running_var"):
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif (
                tensor.ndim >= 2
                and "token" not in name
                and "pos" not in name
                and "embedding" not in name.rpartition(".")[0][-10:]
            ):
                fan = tensor[0].numel()
                tensor.copy_(normal(tensor, math.sqrt(2 / fan)))
            elif name.endswith("weight") and tensor.ndim == 1:
                tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
            elif "gamma" in name or "lambda" in name:
                tensor.copy_(0.2 + 0.5 * torch.rand(tensor.shape, generator=generator))
            elif tensor.ndim:
                tensor.copy_(normal(tensor, 0.2))
    return module.eval()


def saver(content: Any, name: str = "checkpoint.pth", **records: Any) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        torch.save(content, folder / name)
        for record, value in records.items():
            (folder / f"{record}.json").write_text(json.dumps(value, indent=1))

    return write


def imagenet(size: int = 224, to: int = 256, interpolation: str = "bilinear") -> Callable[[Image.Image], Tensor]:
    from torchvision import transforms as T

    return T.Compose(
        [
            T.Resize(to, interpolation=T.InterpolationMode(interpolation)),
            T.CenterCrop(size),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )


def prefixed(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def projector(prefix: str, width: int) -> dict[str, Tensor]:
    return {
        f"{prefix}0.weight": torch.randn(8, width),
        f"{prefix}1.weight": torch.ones(8),
        f"{prefix}3.weight": torch.randn(8, 8),
    }
