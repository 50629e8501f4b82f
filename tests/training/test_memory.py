"""Kept memory: page faults are counted in a process of its own, and a user's own setting is left alone."""

import os
import subprocess
import sys

import pytest

COUNT = """
import ctypes, resource, sys
from training.memory import keep_freed

print(keep_freed() if sys.argv[1] == "kept" else None)
libc = ctypes.CDLL(None)
libc.malloc.argtypes = [ctypes.c_size_t]
libc.malloc.restype = ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 64 << 20
for turn in range(3):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults)
"""


def counted(mode: str, **environment: str) -> list[str]:
    """What `keep_freed` returns, and the page faults of using a freed block of 64 MB again."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-c", COUNT, mode]
    done = subprocess.run(command, env=clean | environment, check=True, capture_output=True, text=True, timeout=120)
    return done.stdout.split()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_a_freed_block_is_used_again_without_page_faults() -> None:
    usual, kept = counted("usual"), counted("kept")
    assert kept[0] == "True"
    assert int(kept[1]) < 10 < int(usual[1])


def test_a_user_s_own_setting_is_left_alone() -> None:
    assert counted("kept", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
