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
"""Instructions that multiply bfloat16, as Linux and torch spell them."""


def choose(precision: Precision, device: torch.device) -> Precision:
    """The format that `precision` stands for on `device`: for "auto" the fastest that is native there, else itself.

    ValueError for a name that is none of PRECISIONS, and for float16 on anything but a CUDA device: torch computes the
    backward pass of a float16 convolution on a CPU without a fast kernel, and one step takes minutes.
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
    """Names of the instruction sets of this processor, from torch where it tells, else from Linux; may be empty."""
    tell = getattr(torch.cpu, "get_capabilities", None)
    if tell is not None:
        return {name for name, present in tell().items() if present is True}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return {flag for line in lines if line.startswith("flags") for flag in line.partition(":")[2].split()}


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[None]:
    """The forward pass's context in a format that `choose` returned; it does nothing in float32."""
    half = None if precision == "float32" else getattr(torch, precision)
    return torch.autocast(device.type, half, enabled=half is not None)


def scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Keeps float16's small gradients from rounding to zero; in every other format it passes all through unchanged."""
    return torch.amp.GradScaler(device.type, enabled=precision == "float16")
