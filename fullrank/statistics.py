"""Statistics of a window of rows, each with its bounds where it has any."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from fullrank import bounds, profile
from fullrank.bounds import MINIMUM_GROUPS, UNKNOWN, Interval
from fullrank.measures import effective_rank, numerical_rank, rankme, stable_rank
from fullrank.moments import Moments, pool
from fullrank.profile import band_sums
from fullrank.reference import Reference
from fullrank.sample import SampleMeasures

NAN = math.nan
NORM_QUANTILES = (0.05, 0.5, 0.95)
# Norms are counted in bins of 1/16 octave, 4.4 % wide, from 2^-40 to 2^40; bin 0 holds rows of zeros.
_BINS_PER_OCTAVE, _OCTAVES = 16, 40
NORM_BINS = 2 * _BINS_PER_OCTAVE * _OCTAVES + 1


@dataclass(frozen=True)
class Band:
    """Variance in the reference's directions `first` to `last` (1-based), as a ratio to the reference."""

    first: int
    last: int
    part: str  # "head": the larger half of the bands by variance; "tail": the others
    ratio: Interval = UNKNOWN


@dataclass(frozen=True, eq=False)
class WindowStatistics:
    """Statistics of the rows of the last `seconds`; NaN where the rows do not determine one.

    eigenvalues (d,) falling; mean_shift_ratio: squared distance of the mean from the reference's, less what sampling
    adds, in units of the reference's total variance; basis_effective_rank: effective rank of the variances along the
    reference's directions, unbiased down to small n, an upper bound of effective_rank (Schur-Horn); zeros: rows of
    zeros, which have no direction and count in nothing else; sample: measures of a bounded sample of the rows;
    wasserstein_uniformity: see `measures.wasserstein_uniformity`; tail_shift: see `profile.tail_shift`;
    independent_rows: how many of the rows are no copies of each other; unknown: statistic -> in words, why the rows do
    not determine it. The numerical rank is then a lower bound.
    """

    seconds: float
    rows: int = 0
    groups: int = 0
    effective_rank: float = NAN
    rankme: float = NAN
    participation_ratio: Interval = UNKNOWN
    stable_rank: float = NAN
    numerical_rank: int = 0
    eigenvalues: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    total_variance: float = NAN
    mean_cosine: float = NAN
    mean_shift_ratio: float = NAN
    bands: tuple[Band, ...] = ()
    head: Interval = UNKNOWN
    basis_effective_rank: float = NAN
    norms: dict[float, float] = field(default_factory=lambda: dict.fromkeys(NORM_QUANTILES, NAN))
    zeros: int = 0
    sample: SampleMeasures = field(default_factory=SampleMeasures)
    wasserstein_uniformity: float = NAN
    tail_shift: float = NAN
    independent_rows: float = NAN
    unknown: dict[str, str] = field(default_factory=dict)

    @property
    def zero_share(self) -> float:
        """Rows of zeros over all rows; NaN without any."""
        return self.zeros / (self.zeros + self.rows) if self.zeros + self.rows else NAN

    @property
    def tail(self) -> tuple[Band, ...]:
        """The bands of small variance."""
        return tuple(band for band in self.bands if band.part == "tail")

    @property
    def bounded(self) -> bool:
        """Whether the rows lie in enough groups for bounds."""
        return self.groups >= MINIMUM_GROUPS

    def eigenvalues_at(self) -> dict[int, float]:
        """The spectrum at ranks 1, 2, 4, 8, ..."""
        return {2**i: float(self.eigenvalues[2**i - 1]) for i in range(len(self.eigenvalues).bit_length())}


class Group(Protocol):
    """A group of consecutive rows, such as a block of `fullrank.monitor.window`."""

    moments: Moments
    energies: Tensor
    norms: Tensor
    zeros: int
    copies: Tensor


def measure(seconds: float, groups: Sequence[Group], reference: Reference | None, dimension: int) -> WindowStatistics:
    """Statistics of the rows in the groups together; bounds by leaving out one group at a time."""
    bands = _empty_bands(reference)
    zeros = sum(group.zeros for group in groups)
    groups = [group for group in groups if group.moments.count]
    if not groups:
        return WindowStatistics(seconds, bands=bands, zeros=zeros)
    n = sum(group.moments.count for group in groups)
    norms = norm_quantiles(torch.stack([group.norms for group in groups]).sum(0))
    if n < 2:
        return WindowStatistics(seconds, n, len(groups), bands=bands, norms=norms, zeros=zeros)
    pooled = pool([group.moments for group in groups])
    mean, eigenvalues, traces = pooled.mean, pooled.eigenvalues, pooled.traces
    # A block of one row has no variance of its own and adds none.
    weights = torch.tensor([float(group.moments.count) for group in groups], dtype=torch.float64)
    copies = torch.stack([group.copies for group in groups]).sum(0)
    variance = float(eigenvalues.sum())
    shift = basis_rank = tail_shift = NAN
    head = Interval()
    if reference is not None:
        shift = profile.mean_shift(mean, reference.mean, variance, n, reference.total_variance)
        energies = torch.stack([group.energies for group in groups])
        basis_rank = effective_rank(energies.sum(0))
        sums = torch.stack([band_sums(row, reference.bands) for row in energies])
        bands = tuple(
            Band(band.first, band.last, band.part, bounds.ratio(sums[:, i], weights, float(reference.band_energy[i])))
            for i, band in enumerate(bands)
        )
        along = (mean - reference.mean) @ reference.basis
        variances = sums.sum(0) / weights.sum()
        tail_shift = profile.tail_shift(along, reference.bands, reference.band_energy, variances, n, reference.rows)
        head = bounds.ratio(profile.head_sum(sums), weights, float(profile.head_sum(reference.band_energy)))
    independent = bounds.independent_rows(traces, copies)
    rank = numerical_rank(eigenvalues, 0.0 if reference is None else reference.noise_floor)
    unknown = {
        "participation_ratio": traces.no_ratio,
        "effective_rank": traces.no_rank(eigenvalues, independent),
    } | dict.fromkeys(("rankme", "stable_rank", "numerical_rank"), _no_span(rank, independent, dimension))
    unknown = {name: reason for name, reason in unknown.items() if reason}
    return WindowStatistics(
        seconds=seconds,
        rows=n,
        groups=len(groups),
        effective_rank=traces.effective_rank(eigenvalues, independent),
        rankme=NAN if "rankme" in unknown else _within(rankme(eigenvalues.sqrt()), dimension),
        participation_ratio=bounds.participation_ratio(pooled, weights, copies),
        stable_rank=NAN if "stable_rank" in unknown else stable_rank(eigenvalues),
        numerical_rank=rank,
        eigenvalues=eigenvalues,
        total_variance=variance,
        mean_cosine=float(mean @ mean) - variance / n,
        mean_shift_ratio=shift,
        bands=bands,
        head=head,
        basis_effective_rank=basis_rank,
        norms=norms,
        zeros=zeros,
        independent_rows=independent,
        tail_shift=tail_shift,
        unknown=unknown,
    )


def _within(rank: float, dimension: int) -> float:
    """A rank in [1, d]; 0 stays. RankMe's epsilon takes one direction to 1 - 1e-7, and many equal ones beyond d."""
    return rank if rank == 0 or math.isnan(rank) else min(max(1.0, rank), float(dimension))


def _no_span(rank: int, independent: float, dimension: int) -> str:
    """In words, why measures that need the whole spectrum are not known: m rows span m - 1 directions at most.

    Where they span half of that or less, it is their law that has no more. Empty where the rows suffice.
    """
    spanned = independent - 1
    if spanned >= dimension or 2 * rank <= spanned:
        return ""
    return f"about {independent:.0f} independent rows cannot span {dimension} dimensions; {dimension + 1} are needed"


def norm_histogram(norms: Tensor) -> Tensor:
    """(NORM_BINS,) counts of (n,) finite norms; additive."""
    bins = (norms.double().log2() + _OCTAVES).mul(_BINS_PER_OCTAVE).clamp(0, NORM_BINS - 2).floor() + 1
    return torch.bincount(torch.where(norms > 0, bins, 0.0).long(), minlength=NORM_BINS)


def norm_quantiles(histogram: Tensor) -> dict[float, float]:
    """quantile -> norm, right to half a bin (2.2 %); NaN without rows."""
    cumulative = histogram.cumsum(0)
    quantiles = {}
    for q in NORM_QUANTILES:
        index = int(torch.searchsorted(cumulative, q * float(cumulative[-1])))
        norm = 0.0 if index == 0 else 2.0 ** ((index - 0.5) / _BINS_PER_OCTAVE - _OCTAVES)
        quantiles[q] = norm if cumulative[-1] else NAN
    return quantiles


def _empty_bands(reference: Reference | None) -> tuple[Band, ...]:
    if reference is None:
        return ()
    half = profile.head_bands(len(reference.bands))
    firsts = (1, *(last + 1 for last in reference.bands[:-1]))
    return tuple(
        Band(first, last, "head" if i < half else "tail")
        for i, (first, last) in enumerate(zip(firsts, reference.bands, strict=True))
    )
