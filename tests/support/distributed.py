"""What two processes and one are compared by: the first steps of every method, and the collectives."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from training import distributed
from training.methods import Method, build

IMAGES, STEPS = 12, 3
HEADS = {"projection": 8, "hidden": 12}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "simclr": ("simclr", HEADS),
    "simclr without projector": ("simclr", {"projector": "none"}),
    "directclr": ("directclr", {"d0": 8}),
    "byol": ("byol", HEADS),
    "byol with a linear predictor": ("byol", HEADS | {"linear_predictor": True, "symmetric": True}),
    "byol without stop-gradient": ("byol", HEADS | {"stop_gradient": False}),
    "simsiam": ("simsiam", {"projection": 8, "bottleneck": 4}),
    "directpred": ("directpred", HEADS),
    "directpred as released": ("directpred", HEADS | {"variant": "released", "frequency": 2}),
    "directpred, optimal": ("directpred", HEADS | {"variant": "optimal"}),
    "directcopy": ("directcopy", HEADS),
    "barlow-twins": ("barlow-twins", HEADS),
    "vicreg": ("vicreg", HEADS),
    "sigreg": ("sigreg", HEADS | {"slices": 16}),
}


class Encoder(nn.Sequential):
    """As small as an encoder gets: every collective costs a switch between processes."""

    dimension = 16

    def __init__(self) -> None:
        wide = nn.Conv2d(8, self.dimension, 3), nn.BatchNorm2d(self.dimension), nn.ReLU()
        super().__init__(nn.Conv2d(1, 8, 3, 2), nn.ReLU(), *wide, nn.AdaptiveAvgPool2d(1), nn.Flatten())


def share(batch: Tensor) -> Tensor:
    """This process's images of a joint batch of two views, (2n, ...) -> (2n / world_size, ...)."""
    size, place = distributed.world_size(), distributed.rank()
    return torch.cat([view.chunk(size)[place] for view in batch.chunk(2)])


def train(name: str) -> dict[str, Tensor]:
    """The gradients of the first step, and the whole state after a few."""
    kind, options = CASES[name]
    torch.manual_seed(0)
    method: Method = build(kind, Encoder(), options).double()  # type: ignore[arg-type]
    distributed.synchronise(method)
    forward = DistributedDataParallel(method) if distributed.world_size() > 1 else method
    optimizer = torch.optim.SGD(method.parameters(), lr=0.02)
    found: dict[str, Tensor] = {}
    for step in range(STEPS):
        batch = torch.randn(2 * IMAGES, 1, 16, 16, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        optimizer.zero_grad()
        forward(share(batch)).backward()
        if step == 0:
            found |= {f"grad {key}": p.grad.clone() for key, p in method.named_parameters() if p.grad is not None}
        optimizer.step()
        method.step(step / STEPS)
    return found | {f"state {key}": value.clone() for key, value in method.state_dict().items()}


def operations() -> dict[str, Tensor]:
    """The collectives and the BatchNorm on a joint (8, 3, 2, 2) input, gradients averaged as DDP averages them."""
    joint = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    x = joint.chunk(distributed.world_size())[distributed.rank()].clone().requires_grad_()
    norm = nn.Sequential(nn.BatchNorm2d(3, momentum=None)).double()
    with torch.no_grad():
        norm[0].weight.copy_(torch.tensor([1.0, 2.0, 3.0]))
    distributed.synchronise(norm)
    rows = distributed.gather(norm(x))
    total = distributed.all_reduce(x.square().sum())
    ((rows**3).sum() * total.log()).backward()
    assert x.grad is not None
    mine = x.grad / distributed.world_size()
    statistics = {f"norm {key}": value.clone() for key, value in norm.state_dict().items()}
    return {"rows": rows.detach(), "total": total.detach(), "x": distributed.gather(mine), **statistics}


def everything() -> Iterator[tuple[str, Tensor]]:
    for name in CASES:
        yield from ((f"{name}/{key}", value) for key, value in train(name).items())
    yield from ((f"operations/{key}", value) for key, value in operations().items())


def write(out: Path) -> None:
    """What each process does under torchrun; the first writes what it ends with."""
    assert distributed.setup().type == "cpu"
    assert distributed.world_size() == 2
    found = dict(everything())
    if distributed.rank() == 0:
        save_file({key: value.contiguous() for key, value in found.items()}, out)
