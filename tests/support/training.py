"""Every method at a size that a test can afford."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.artifact import Architecture
from models.backbones.resnet import ResNet
from training.methods import Method, build

TINY = Architecture(name="resnet18", width=4, in_channels=1, stem="3x3/2")
OPTIONS: dict[str, dict[str, Any]] = {
    "simclr": {"projection": 8},
    "directclr": {"d0": 8},
    "byol": {"projection": 8, "hidden": 16},
    "simsiam": {"projection": 16, "bottleneck": 4},
    "directpred": {"projection": 8, "hidden": 16},
    "directcopy": {"projection": 8, "hidden": 16},
    "barlow-twins": {"projection": 16, "hidden": 16},
    "vicreg": {"projection": 16, "hidden": 16},
    "sigreg": {"projection": 16, "hidden": 16, "slices": 32},
}


def torchrun_script(out: Path, how: str) -> subprocess.CompletedProcess[str]:
    """tests/support/torchrun.py by two processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "tests.support.torchrun", str(out), how]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, env=environment, timeout=1200, capture_output=True, text=True, check=False)


def small_encoder() -> ResNet:
    torch.manual_seed(0)
    return TINY.build()


def small(name: str, **options: Any) -> Any:
    return build(name, small_encoder(), OPTIONS[name] | options)


def views(n: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(2 * n, 1, 28, 28, generator=torch.Generator().manual_seed(seed))


def train(method: Method, steps: int = 3, lr: float = 0.05) -> Method:
    """Plain SGD with everything that `parameter_groups` asks for."""
    groups = [{"params": g["params"], "lr": lr * g.get("lr_scale", 1)} for g in method.parameter_groups()]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9)
    for step in range(steps):
        optimizer.zero_grad()
        method(views(seed=step)).backward()
        optimizer.step()
        method.step((step + 1) / steps)
    return method
