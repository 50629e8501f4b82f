"""The number format that a training step computes in: float32, or a half format under autocast.

Weights, gradients, BatchNorm's statistics and the loss stay in float32 in every format (Micikevicius et al., Mixed
Precision Training, ICLR 2018). A half format pays only where the hardware multiplies in it. A processor that emulates
bfloat16 is 1.5 to 2.4 times slower in it than in float32.
"""

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, get_args

import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)
CPU_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
"""Names, in Linux and torch, of the instruction sets that multiply bfloat16."""


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


def cpu_instructions() -> set[str]:
    """Names of this processor's instruction sets, from torch or else from Linux; may be empty."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    if tell is not None:
        return {name for name, present in tell().items() if present is True}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The autocast context of the forward pass in a format that `choose` returned. It does nothing in float32."""
    half = None if precision == "float32" else getattr(torch, precision)
    return torch.autocast(device.type, half, enabled=half is not None)


def scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """A gradient scaler, which keeps small float16 gradients from rounding to zero. It does nothing elsewhere."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")
