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
# Two rows are copies where their squared distance is below this share of their mean square about the mean: about
# that of a picture that was encoded again.
COPY_SHARE = 0.02


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


def band_sizes(bands: tuple[int, ...]) -> Tensor:
    """(len(bands),) how many directions each band has."""
    return torch.tensor(bands).diff(prepend=torch.zeros(1, dtype=torch.int64))


def head_bands(count: int) -> int:
    """How many of `count` bands are the head, the larger half of them by variance; the others are the tail."""
    return (count + 1) // 2


def head_sum(sums: Tensor) -> Tensor:
    """(..., bands) -> (...): the energy of the head."""
    return sums[..., : head_bands(sums.shape[-1])].sum(-1)


def centred(rows: Tensor) -> Tensor:
    """Rows (n, d) about their own mean, which is taken in float64."""
    return rows - rows.mean(0, dtype=torch.float64).to(rows.dtype)


def energies_of_rows(rows: Tensor, basis: Tensor | None) -> Tensor:
    """(d,) n times the variance of n >= 2 centred rows (n, d) along each column of the basis (d, d), in float64.

    Without a basis, rows are in its coordinates already. Additive over blocks. A block is centred on its own mean:
    about any other, a jump of the mean would fill the tail.
    """
    along = rows if basis is None else rows @ basis
    return energies_of_sums(along.double().square().sum(0), 0.0, len(rows))


def energies_of_sums(squares: Tensor, squared_sums: Tensor | float, n: int) -> Tensor:
    """(..., d) as `energies_of_rows`, together, of blocks of n rows each that are not centred.

    squares, squared_sums (..., d): along each direction the sum of the rows' squares, and over the blocks that of the
    squares of their sums, 0 where each is centred.
    """
    return (squares - squared_sums / n) * (n / (n - 1))


def energies_of_covariance(covariance: Tensor, basis: Tensor) -> Tensor:
    """(d,) the variance along each column of the basis."""
    return (covariance @ basis * basis).sum(0)


def block_products(rows: Tensor, previous: Tensor, gram: Tensor | None = None) -> tuple[float, float]:
    """tr S tr S' and <S, S'> of the covariances of two blocks of centred rows, (n, d) and (m, d).

    The blocks are independent, so the expectations are (tr C)^2 and tr C^2, and the ratio of sums of these products is
    a participation ratio. <S, S'> = |Y Y'^T|^2 needs no d x d matrix. gram (n, m): Y Y'^T, where it is at hand.
    """
    gram = rows @ previous.T if gram is None else gram
    scale = (len(rows) - 1) * (len(previous) - 1)
    trace = float(rows.double().square().sum() * previous.double().square().sum()) / scale
    return trace, float(gram.double().square().sum()) / scale


def copies(
    rows: Tensor, other: Tensor | None = None, gram: Tensor | None = None, apart: Tensor | None = None
) -> Tensor:
    """(2,) the weight of the pairs that are copies of each other, and of all pairs; a pair's is |y|^2 |z|^2.

    Pairs of distinct rows of one centred block (n, d), or, with `other` (m, d), one of each. apart (d,): the mean of
    the first less that of the other. gram (n, m): their products, where at hand. A pair counts as copies where its
    squared distance is at most `COPY_SHARE` of its mean square: independent rows of many dimensions never are, of one
    they often are.
    """
    second = rows if other is None else other
    gram = rows @ second.T if gram is None else gram
    squares, others = rows.square().sum(1), second.square().sum(1)
    sums = squares[:, None] + others
    distances = sums - 2 * gram
    if apart is not None:
        distances += 2 * (rows @ apart)[:, None] - 2 * (second @ apart) + apart.square().sum()
    near = distances <= (COPY_SHARE / 2) * sums
    if other is None:
        near.fill_diagonal_(fill_value=False)
    squares, others = squares.double(), others.double()
    weight = float(squares @ (near.double() @ others))
    total = float(squares.sum() * others.sum())
    if other is None:
        weight, total = weight / 2, (total - float(squares.square().sum())) / 2
    return torch.tensor([weight, total], dtype=torch.float64)


def mean_shift(mean: Tensor, reference_mean: Tensor, variance: float, n: int, total: float) -> float:
    """Squared distance of a mean (d,) of n rows from the reference's, less what sampling adds, over `total`.

    variance: the rows' total variance. An unbiased estimate, hence negative at times where nothing has moved.
    """
    return (float((mean - reference_mean).square().sum()) - variance / n) / total


def tail_shift(
    shift: Tensor, bands: tuple[int, ...], band_energy: Tensor, variances: Tensor, n: int, reference_rows: float
) -> float:
    """Mean over the tail's directions of the mean's squared shift, each in units of the reference's variance there.

    shift (d,): of a mean of n rows from the reference's, along the basis; band_energy, variances (bands,): variance of
    the reference and of the rows in each band; reference_rows: how many gave the reference's mean,
    infinite where these rows are drawn from them. What sampling adds
    to both means is taken off, so that healthy traffic reads about 0, a little below at times. Changed preprocessing
    moves the tail, where the mix of healthy traffic hardly reaches: half of the classes alone move it less than 0.002.
    NaN below 1,024 rows, where a few sessions are all there is, and without a tail.
    """
    head = head_bands(len(bands))
    if n < LEAST_TAIL_ROWS or head == len(bands):
        return math.nan
    sizes = band_sizes(bands)[head:]
    squares = band_sums(shift.square(), bands)[head:]
    # In units of the reference's mean variance within each band: single eigenvalues of a sample are noisy.
    units = band_energy[head:] / sizes
    sampling = (variances[head:] / units).sum() / n + sizes.sum() / reference_rows
    return float(((squares / units).sum() - sampling) / sizes.sum())
