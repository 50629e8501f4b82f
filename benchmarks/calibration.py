"""CPU seconds to build a reference: measuring its rows, and calibrating it.

    OMP_NUM_THREADS=1 python -m benchmarks.calibration --dimension 1280 --rows 6144

Rows are simulated: ten classes, variances that fall as 1 / rank, and descriptors as wide as a colour thumbnail.
"""

import argparse
import time

import torch
from torch import Tensor

from fullrank import Reference
from fullrank.calibration.resample import calibrated

CLASSES, DESCRIPTORS = 10, 192


def drawn(n: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Rows (n, d) and descriptors (n, 192)."""
    generator = torch.Generator().manual_seed(seed)
    centres = 0.5 * torch.randn(CLASSES, d, generator=torch.Generator().manual_seed(99))
    labels = torch.randint(CLASSES, (n,), generator=generator)
    rows = (torch.randn(n, d, generator=generator) + centres[labels]) * torch.arange(1, d + 1) ** -0.5 + 0.1
    return rows, torch.rand(n, DESCRIPTORS, generator=generator)


def main() -> None:
    """Print the CPU seconds of both parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dimension", type=int, default=1280)
    parser.add_argument("--rows", type=int, default=6144, help="half for the directions, half held out")
    options = parser.parse_args()
    first, _ = drawn(options.rows // 2, options.dimension, 1)
    second, inputs = drawn(options.rows // 2, options.dimension, 2)
    started = time.process_time()
    reference = Reference.build(first, second, calibrate=False)
    measured = time.process_time()
    calibrated(reference, second, None, inputs)
    done = time.process_time()
    print(f"measured in {measured - started:.1f} CPU seconds, calibrated in {done - measured:.1f}")


if __name__ == "__main__":
    main()
