"""Optimisers of the papers: SGD, LARS and AdamW over a method's own parameter groups, and their schedule."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from training.methods import Method
from training.recipes import Recipe


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You et al. 2017, algorithm 1), with foreach operations.

    For a weight w with gradient g: rate = trust |w| / (|g| + weight_decay |w|); v <- momentum v + lr rate
    (g + weight_decay w); w <- w - v. The rate is 1 where either norm is 0, and in groups with `adapt=False`, where
    biases and BatchNorm belong (SimCLR, Chen et al. 2020, section 2.2). `clip` keeps lr rate at lr or below, as
    solo-learn and Apex's LARC do.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust: float = 1e-3,
        clip: bool = False,
        adapt: bool = True,
    ) -> None:
        settings = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, settings | {"trust": trust, "clip": clip, "adapt": adapt})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        for group in self.param_groups:
            weights: list[Tensor] = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            for w in weights:
                if "velocity" not in self.state[w]:
                    self.state[w]["velocity"] = torch.zeros_like(w)
            velocities = [self.state[w]["velocity"] for w in weights]
            gradients = [w.grad for w in weights if w.grad is not None]
            decay = group["weight_decay"]
            updates = torch._foreach_add(gradients, weights, alpha=decay)
            if group["adapt"]:
                sizes, slopes = torch._foreach_norm(weights), torch._foreach_norm(gradients)
                rates = [
                    torch.where((w > 0) & (g > 0), group["trust"] * w / (g + decay * w), 1.0)
                    for w, g in zip(sizes, slopes, strict=True)
                ]
                if group["clip"] and group["lr"] > 0:
                    rates = [(rate / group["lr"]).clamp(max=1) for rate in rates]
                torch._foreach_mul_(updates, rates)
            torch._foreach_mul_(velocities, group["momentum"])
            torch._foreach_add_(velocities, updates, alpha=group["lr"])
            torch._foreach_sub_(weights, velocities)
        return None


def optimizer(method: Method, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over `method.parameter_groups()`, each split in two.

    Weight decay and LARS' adaptation apply to matrices and kernels only, as in the papers that use LARS. The SGD of
    SimSiam's and DirectPred's papers decays biases and BatchNorm too.
    """
    groups: list[dict[str, Any]] = []
    for group in method.parameter_groups():
        scale = group.get("lr_scale", 1.0)
        shared = {"constant_lr": group.get("constant_lr", False)}
        matrices = [p for p in group["params"] if p.ndim > 1]
        vectors = [p for p in group["params"] if p.ndim <= 1]
        decay = group.get("weight_decay", recipe.weight_decay)
        groups.append(shared | {"params": matrices, "lr_scale": scale, "weight_decay": decay, "adapt": True})
        groups.append(
            shared | {"params": vectors, "lr_scale": scale * recipe.bias_lr_scale, "weight_decay": 0.0, "adapt": False}
        )
    groups = [group for group in groups if group["params"]]
    if recipe.optimizer == "lars":
        return LARS(groups, lr=recipe.learning_rate, trust=recipe.trust, clip=recipe.trust_clip)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.learning_rate, momentum=0.9)
    return torch.optim.AdamW(groups, lr=recipe.learning_rate)


def set_learning_rate(solver: torch.optim.Optimizer, peak: float, factor: float, warm: float) -> None:
    """Set each group's rate to peak x its scale x `factor`, or x `warm` (warm-up only) if its rate is constant."""
    for group in solver.param_groups:
        group["lr"] = peak * group["lr_scale"] * (warm if group["constant_lr"] else factor)


def warm_up(step: int, total: int, share: float) -> float:
    """The warm-up factor: linear from 1 / rise to 1 over the first `share` of the run (`rise` steps), then 1."""
    rise = round(total * share)
    return min(1.0, (step + 1) / rise) if rise else 1.0


def cosine(step: int, total: int, share: float, final: float = 0.0) -> float:
    """Linear warm-up over `share` of the run, then half a cosine from 1 to `final`; a factor in (0, 1]."""
    rise = round(total * share)
    if step < rise:
        return warm_up(step, total, share)
    fall = 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total - rise)))
    return final + (1 - final) * fall
