"""The profile of rows against a reference: each statistic that thresholds are made of, computed in one place.

Calibration, monitor, gate, training and fleet call these same functions as `profile.NAME`, so that a threshold and the
value held against it are the same statistic. docs/explanation/statistics.md says what each of them means.
"""

import math

import torch
from torch import Tensor

# A band whose mean held-out eigenvalue is below this share of the mean eigenvalue holds dead units, not directions.
EMPTY_SHARE = 1e-6
LEAST_TAIL_ROWS = 1024


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


def head_bands(count: int) -> int:
    """How many of `count` bands are the head, the larger half of them by variance; the others are the tail."""
    return (count + 1) // 2


def head_sum(sums: Tensor) -> Tensor:
    """(..., bands) -> (...): the energy of the head."""
    return sums[..., : head_bands(sums.shape[-1])].sum(-1)


def centred(rows: Tensor) -> Tensor:
    """Rows (n, d) about their own mean, which is taken in float64."""
    return rows - rows.mean(0, dtype=torch.float64).to(rows.dtype)


def energies_of_rows(rows: Tensor, basis: Tensor) -> Tensor:
    """(d,) n times the variance of n >= 2 centred rows (n, d) along each column of the basis (d, d), in float64.

    Additive over blocks. A block is centred on its own mean: about any other, a jump of the mean would fill the tail.
    """
    n = len(rows)
    return (rows @ basis).double().square().sum(0) * (n / (n - 1))


def energies_of_covariance(covariance: Tensor, basis: Tensor) -> Tensor:
    """(d,) the variance along each column of the basis."""
    return (covariance @ basis * basis).sum(0)


def block_products(rows: Tensor, previous: Tensor) -> tuple[float, float]:
    """tr S tr S' and <S, S'> of the covariances of two blocks of centred rows, (n, d) and (m, d).

    The blocks are independent, so the expectations are (tr C)^2 and tr C^2, and the ratio of sums of these products is
    a participation ratio. <S, S'> = |Y Y'^T|^2 needs no d x d matrix.
    """
    y, z = (it / math.sqrt(len(it) - 1) for it in (rows, previous))
    trace = float(y.double().square().sum() * z.double().square().sum())
    return trace, float((y @ z.T).double().square().sum())


def mean_shift(mean: Tensor, reference_mean: Tensor, variance: float, n: int, total: float) -> float:
    """Squared distance of a mean (d,) of n rows from the reference's, less what sampling adds, over `total`.

    variance: the rows' total variance. An unbiased estimate, hence negative at times where nothing has moved.
    """
    return (float((mean - reference_mean).square().sum()) - variance / n) / total


def tail_shift(
    shift: Tensor, bands: tuple[int, ...], band_energy: Tensor, variances: Tensor, n: int, reference_rows: int
) -> float:
    """Mean over the tail's directions of the mean's squared shift, each in units of the reference's variance there.

    shift (d,): of a mean of n rows from the reference's, along the basis; band_energy, variances (bands,): variance of
    the reference and of the rows in each band; reference_rows: how many gave the reference's mean. What sampling adds
    to both means is taken off, so that healthy traffic reads about 0, a little below at times. Changed preprocessing
    moves the tail, where the mix of healthy traffic hardly reaches: half of the classes alone move it less than 0.002.
    NaN below 1,024 rows, where a few sessions are all there is, and without a tail.
    """
    head = head_bands(len(bands))
    if n < LEAST_TAIL_ROWS or head == len(bands):
        return math.nan
    sizes = torch.tensor(bands).diff(prepend=torch.zeros(1, dtype=torch.int64))[head:]
    squares = band_sums(shift.square(), bands)[head:]
    # In units of the reference's mean variance within each band: single eigenvalues of a sample are noisy.
    units = band_energy[head:] / sizes
    sampling = (variances[head:] / units).sum() / n + sizes.sum() / reference_rows
    return float(((squares / units).sum() - sampling) / sizes.sum())
