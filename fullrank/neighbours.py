"""Measures of neighbourhoods: what a search sees, and what no covariance does.

rows: (n, d) of any float dtype; they are L2-normalised here, and distances are those between unit rows. All of it costs
n^2 d, so give it a bounded sample. NaN where the rows are too few or not finite.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.rows import ArrayLike, as_rows, unit

NEIGHBOURS = 10
# Rows nearer than this share of the usual distance are copies of one another, and rows nearer than rounding leaves two
# float32 embeddings of one image.
COPY = 1e-4
_ROUNDING = 2e-6
_NORMAL = 1.96  # two-sided 95 %


class LocalDimension(NamedTuple):
    """Intrinsic dimension near a row, with its two-sided 95 % bounds."""

    lower: float
    estimate: float
    upper: float


class Copies(NamedTuple):
    """Share of the rows that have a copy among the others, and how many different rows there are."""

    share: float
    distinct: int


def squared_distances(rows: ArrayLike) -> Tensor:
    """(n, n) squared distances between unit rows, in [0, 4], float64; infinite on the diagonal."""
    z = unit(as_rows(rows, dtype=torch.float64))
    squares = (2 - 2 * (z @ z.T)).clamp(min=0)
    return squares.fill_diagonal_(math.inf)


def between(points: Tensor) -> Tensor:
    """(n, n) squared distances between points (n, k) as they are, at least 0, in their dtype; NaN where one is."""
    x = points - points.nanmean(0)
    lengths = x.square().sum(1)
    return (lengths[:, None] + lengths - 2 * (x @ x.T)).clamp(min=0)


def nearest(squares: Tensor, k: int = NEIGHBOURS) -> Tensor:
    """(n, k) indices of the k nearest, from (n, n) squared distances with infinity on the diagonal."""
    return squares.topk(k, largest=False).indices


def nearest_angle(rows: Tensor) -> float:
    """Median angle in degrees from a row (n, d) to the nearest other one; NaN for fewer than 2 rows."""
    if len(rows) < 2:
        return math.nan
    chords = squared_distances(rows).amin(1).sqrt()
    return float(torch.rad2deg(2 * torch.asin((chords / 2).clamp(max=1))).median())


def overlap(before: Tensor, now: Tensor) -> float:
    """Mean share of each row's k nearest neighbours before that are among its k nearest now, in [0, 1].

    before, now: (n, k) indices. 1: a search finds what it found. k / (n - 1) where the two have nothing to do with each
    other. Blind to any rotation and scaling of all rows alike. Neighbourhood overlap: Raju 2026, arXiv 2604.17698.
    """
    same = before[:, :, None] == now[:, None, :]
    return float(same.any(2).double().mean())


def rank_correlation(before: Tensor, now: Tensor) -> float:
    """Spearman's rank correlation of two vectors (m,), in [-1, 1]; ties share no rank, NaN below 3 values.

    Of the distances of all pairs it says how much of the geometry is left (2604.17698): sensitive to what changes the
    order of distances, and to no monotone change of them.
    """
    return correlation(ranks(before), ranks(now))


def ranks(values: Tensor) -> Tensor:
    """(m,) the place of each value among all, from 0; of equal values each has a place of its own."""
    found = torch.empty(len(values), dtype=torch.int64)
    found[values.argsort()] = torch.arange(len(values))
    return found


def correlation(x: Tensor, y: Tensor) -> float:
    """Pearson's correlation of two vectors (m,) of ranks, each a permutation of 0 to m - 1; NaN below 3 values."""
    if len(x) < 3:
        return math.nan
    middle = (len(x) - 1) / 2
    x = x.double() - middle
    return float(x @ (y.double() - middle) / x.square().sum())


def hubness(squares: Tensor, k: int = NEIGHBOURS) -> float:
    """Skewness of how often a row is among the k nearest of the others, from (n, n) squared distances.

    About 0 to 1 where neighbourhoods are fair; far above where a few rows, the hubs, are everybody's neighbours, which
    a search returns whatever is asked. Grows with the intrinsic dimension, and slowly with n: compare at equal n. Blind
    to rank. Radovanovic et al. 2010, equation 1. NaN for n <= k, 0 where all rows are chosen alike.
    """
    n = len(squares)
    if n <= k:
        return math.nan
    counts = torch.bincount(nearest(squares, k).flatten(), minlength=n).double()
    centred = counts - counts.mean()
    deviation = float(centred.square().mean().sqrt())
    return float(centred.pow(3).mean()) / deviation**3 if deviation > 0 else 0.0


def local_dimension(squares: Tensor) -> LocalDimension:
    """Intrinsic dimension from the ratio of the distances to the two nearest rows: TwoNN (Facco et al. 2017, eq. 3).

    The ratio mu of the second to the first has the law 1 - mu^-D, whatever the density, so that
    D = (n - 1) / sum ln mu, and the bounds follow from the sum's normal law; two rows that are each other's nearest
    share a distance and count for one. Sees a collapse onto a curved surface that fills all directions, as no
    covariance does (LDReg, 2401.10474). Reads low where D is large for n. Rows with a copy say nothing of it and are
    left out; NaN where fewer than 64 are left.
    """
    first, second = squares.topk(2, largest=False).values.T if len(squares) > 2 else torch.ones(2, 0)
    ratios = 0.5 * (second / first).log()[first > _copy(squares)]
    ratios = ratios[ratios.isfinite()]
    n = len(ratios)
    total = float(ratios.sum())
    if n < 64 or total <= 0:
        return LocalDimension(math.nan, math.nan, math.nan)
    estimate = (n - 1) / total
    first_of = squares.argmin(1)
    mutual = float((first_of[first_of] == torch.arange(len(squares))).double().mean())
    half = _NORMAL * math.sqrt((1 + mutual) / n)
    return LocalDimension(estimate * (1 - half), estimate, estimate * (1 + half))


def copies(squares: Tensor) -> Copies:
    """Rows that are copies of one another up to rounding, from (n, n) squared distances. Tolerance: 1e-4 of the root
    mean square distance, at least 2e-6. Rows that all lie at one point within it are copies of one row."""
    n = len(squares)
    if n < 2:
        return Copies(0.0, n)
    same = squares <= _copy(squares)
    share = float(same.any(1).double().mean())
    # A row is the first of its kind if no earlier row equals it.
    repeated = same.tril(-1).any(1)
    return Copies(share, n - int(repeated.sum()))


def shared_answers(squares: Tensor, inputs: Tensor, reach: float) -> float:
    """Share of the rows that equal, up to rounding, the row of another input: one answer given to different images.

    squares: (n, n) as above; inputs: (n, n) squared distances between inputs, NaN where one is not known; reach: the
    squared distance up to which two inputs count as the same picture. NaN where fewer than two inputs are known. 0 in
    health, whatever images repeat.
    """
    known = int(inputs.diagonal().isfinite().sum())
    if known < 2:
        return math.nan
    # Comparisons with NaN are false.
    shared = (squares <= _ROUNDING**2) & (inputs > reach)
    return int(shared.any(1).sum()) / known


def _copy(squares: Tensor) -> float:
    """The squared distance up to which two rows are copies."""
    n = len(squares)
    usual = float(squares[squares.isfinite()].sum()) / max(1, n * (n - 1))
    return max(COPY**2 * usual, _ROUNDING**2)
