"""Settings of the memory allocator for training on a CPU: freed memory is kept, and large tensors lie in huge pages.

A step frees some hundred megabytes and asks for them again. By default the C library gives large blocks back to the
kernel, which hands them out again as zeroed pages of 4 kB, each at the cost of a fault.
"""

import ctypes
import os

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of mallopt(3)."""
LARGEST = 1 << 30
"""Blocks above this many bytes still go back to the kernel."""
GUARANTEED = 32 << 20
"""What an old glibc takes at most."""
OWN_CHOICE = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed() -> bool:
    """Set the process's allocator so. Returns whether the C library can, and the user's environment leaves it to us.

    Call it before the first tensor is made: PyTorch asks its variable for huge pages once. They need a kernel whose
    /sys/kernel/mm/transparent_hugepage/enabled is not `never`.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if any(name in os.environ for name in OWN_CHOICE):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # not glibc
        return False
    taken = mallopt(M_MMAP_THRESHOLD, LARGEST) or mallopt(M_MMAP_THRESHOLD, GUARANTEED)
    return bool(taken and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
