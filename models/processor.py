"""What this machine's processor can do: its instruction sets, and whether it multiplies bfloat16 or emulates it."""

from pathlib import Path

import torch

CPU_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16"})
"""Names, in Linux and torch, of the instruction sets that multiply bfloat16."""


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


def emulates_bfloat16() -> bool:
    """Whether this processor is known to have no instructions for bfloat16, so that float32 is faster."""
    names = cpu_instructions()
    # Arm names its own differently. A processor that tells nothing is not accused.
    return bool(names) and not any("bf16" in name for name in names)
