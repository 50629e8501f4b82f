"""The number format that a training step computes in: float32, or a half format under autocast.

Weights, gradients, BatchNorm's statistics and the loss stay in float32 in every format (Micikevicius et al., Mixed
Precision Training, ICLR 2018). A half format pays only where the hardware multiplies in it. A processor that emulates
bfloat16 is 1.5 to 2.4 times slower in it than in float32.
"""

from contextlib import AbstractContextManager
from typing import Literal, get_args

import torch

from models.processor import CPU_BFLOAT16, cpu_instructions

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)


def choose(precision: Precision, device: torch.device) -> Precision:
    """The format to use on `device`. For "auto" it is the fastest native one, otherwise `precision` itself.

    Raises ValueError for a name that is not in PRECISIONS, and for float16 on any device but CUDA: on a CPU torch has
    no fast kernel for the backward pass of a float16 convolution, and one step takes minutes.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if precision == "float16" and device.type != "cuda":
        raise ValueError(f"precision is float16, which trains on CUDA only, not on {device.type}: take auto or float32")
    if precision != "auto":
        return precision
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    if device.type == "cpu" and CPU_BFLOAT16 & cpu_instructions():
        return "bfloat16"
    return "float32"


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The autocast context of the forward pass in a format that `choose` returned. It does nothing in float32."""
    half = None if precision == "float32" else getattr(torch, precision)
    return torch.autocast(device.type, half, enabled=half is not None)


def scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """A gradient scaler, which keeps small float16 gradients from rounding to zero. It does nothing elsewhere."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")
