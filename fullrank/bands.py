"""Bands of directions: energies along a basis, summed over ranks 1, 2, 3-4, 5-8, ..."""

import torch
from torch import Tensor

# A band whose mean held-out eigenvalue is below this share of the mean eigenvalue holds dead units, not directions.
EMPTY_SHARE = 1e-6


def log_bands(dimension: int) -> tuple[int, ...]:
    """Upper ranks 1, 2, 4, ... d: bands of directions of equal width in log rank."""
    return (*(2**i for i in range((dimension - 1).bit_length())), dimension)


def merged_bands(energies: Tensor, floor: float) -> tuple[int, ...]:
    """Log bands of (d,) energies; one whose mean is below `floor` or 1e-6 of the mean joins the one before."""
    floor = max(floor, EMPTY_SHARE * float(energies.mean()))
    bands: list[int] = []
    start = 0
    for end in log_bands(len(energies)):
        if bands and float(energies[start:end].mean()) < floor:
            bands.pop()
        bands.append(end)
        start = end
    return tuple(bands)


def band_sums(energies: Tensor, bands: tuple[int, ...]) -> Tensor:
    """(len(bands),) sums of (d,) direction energies."""
    ends = torch.cat((torch.zeros(1, dtype=torch.float64), energies.double().cumsum(0)))[[0, *bands]]
    return ends.diff()
