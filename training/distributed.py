"""Distributed training: joins the processes that `torchrun` starts, and has collectives with gradients.

Gradients are right under this rule: the mean of the processes' losses is the joint loss, and the backward pass of every
collective is its true adjoint. `DistributedDataParallel` then averages the parameters' gradients into those of one
process on the joint batch. Without a process group every function here is the identity.
"""

import os
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd import Function


def device_of(name: str) -> torch.device:
    """The device of that name. Raises ValueError for a name that torch does not know, or a GPU that is not there."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}; cpu always works") from error
    return device


def setup(device: str = "cpu") -> torch.device:
    """Join torchrun's process group, if its environment variables are set. Returns this process's device.

    On CUDA that is the GPU number LOCAL_RANK, with NCCL; otherwise `device` itself, with gloo. Raises ValueError as
    `device_of` does.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        return device_of(device)
    cuda = torch.device(device).type == "cuda"
    mine = device_of(f"cuda:{os.environ['LOCAL_RANK']}" if cuda else device)
    if cuda:
        torch.cuda.set_device(mine)
    dist.init_process_group("nccl" if cuda else "gloo")
    return mine


def shutdown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


class _Sum(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient)


class _Gather(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return all_reduce(gradient).chunk(world_size())[rank()]


def all_reduce(x: Tensor) -> Tensor:
    """The sum of x over all processes, for any shape, with gradient."""
    return x if world_size() == 1 else cast(Tensor, _Sum.apply(x))  # type: ignore[no-untyped-call]


def gather(x: Tensor) -> Tensor:
    """Gather the rows (n, ...) of all processes, n the same on all: (n * world_size, ...), by rank, with gradient."""
    return x if world_size() == 1 else cast(Tensor, _Gather.apply(x))  # type: ignore[no-untyped-call]


class BatchNorm(nn.modules.batchnorm._BatchNorm):
    """BatchNorm over the joint batch, on any device: `nn.SyncBatchNorm` refuses the CPU. (n, c, ...) -> (n, c, ...)."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002
        if input.ndim < 2:
            raise ValueError(f"BatchNorm takes (n, channels, ...), not shape {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        if not self.training or world_size() == 1:
            return super().forward(input)
        axes = [0, *range(2, input.ndim)]
        shape = [1, -1, *[1] * (input.ndim - 2)]
        x = input.to(torch.promote_types(input.dtype, torch.float32))
        count = all_reduce(x.new_tensor(float(x.numel() // x.shape[1])))
        mean = all_reduce(x.sum(axes)) / count
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(axes)) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            self.running_mean.lerp_(mean, share)
            self.running_var.lerp_(variance * count / (count - 1), share)
        x = centred * (variance + self.eps).rsqrt().view(shape)
        if self.affine:
            x = x * self.weight.view(shape) + self.bias.view(shape)
        return x.to(input.dtype)


def synchronise(module: nn.Module, device: torch.device | str = "cpu") -> nn.Module:
    """Make every BatchNorm in `module` see the joint batch; parameters and buffers stay the same tensors."""
    if world_size() == 1:
        return module
    if torch.device(device).type == "cuda":
        return cast(nn.Module, nn.SyncBatchNorm.convert_sync_batchnorm(module))  # type: ignore[no-untyped-call]
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                fresh = BatchNorm(child.num_features, child.eps, child.momentum, child.affine)
                fresh.__dict__.update(child.__dict__)
                setattr(parent, name, fresh)
    return module
