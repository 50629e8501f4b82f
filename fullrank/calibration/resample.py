"""Resamples healthy traffic from healthy rows, and calibrates a reference on it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Generator, Tensor

from fullrank import profile
from fullrank.calibration.enough import MINIMUM_ROWS
from fullrank.calibration.inputs import InputReference
from fullrank.calibration.ranges import BLOCK_ROWS, NAMED, Calibration
from fullrank.calibration.windows import Pool, columns, log_ratio
from fullrank.reference import Reference
from fullrank.rows import ArrayLike, as_rows, unit

SESSION = 32
# A day at 20 rows a second.
DAY = 86_400 * 20
WINDOWS = (1024, 6144)
# One window in so many has its eigenvalues computed.
SPECTRUM_EVERY = 4
# One in so many has its pairs of rows compared with those of its inputs.
PAIRS_EVERY = 2
# Rows to draw from, at most: the products of all pairs cost their square.
MOST_ROWS = 12_288


class Traffic:
    """Draws healthy traffic: indices into labelled rows, with replacement, by one of several laws. Deterministic in
    the seed."""

    def __init__(self, labels: Tensor, seed: int = 0) -> None:
        self.labels = labels
        self.generator = Generator().manual_seed(seed)
        self._order = labels.argsort(stable=True)
        self.classes, self._counts = torch.unique(labels, return_counts=True)
        self._starts = self._counts.cumsum(0) - self._counts

    def independent(self, n: int, at: int = 0) -> Tensor:
        """(n,) rows drawn alike and independently."""
        return torch.randint(len(self.labels), (n,), generator=self.generator)

    def sessions(self, n: int, at: int = 0) -> Tensor:
        """(n,) rows in runs of 32 of one class."""
        runs = torch.randint(len(self.classes), (math.ceil(n / SESSION),), generator=self.generator)
        return self.of(runs.repeat_interleave(SESSION)[:n])

    def drifting(self, n: int, at: int = 0) -> Tensor:
        """(n,) rows from position `at` on of a class mix that turns once a day: each class swells and shrinks by half
        of its share, one after the other."""
        kept: list[Tensor] = []
        phase = 2 * math.pi * at / DAY
        share = 1 + 0.5 * torch.sin(phase + torch.arange(len(self.classes)) * (2 * math.pi / len(self.classes)))
        position = torch.searchsorted(self.classes, self.labels)
        while sum(map(len, kept)) < n:
            rows = self.independent(2 * n)
            kept.append(rows[torch.rand(2 * n, generator=self.generator) * 1.5 < share[position[rows]]])
        return torch.cat(kept)[:n]

    def narrow(self, n: int, which: int) -> Tensor:
        """(n,) rows of one class only, the one at index `which` of `classes`."""
        return self.of(torch.full((n,), which))

    def laws(self) -> tuple[Callable[[int, int], Tensor], ...]:
        """The three kinds of healthy traffic, each (n, at) -> (n,) indices."""
        return self.independent, self.sessions, self.drifting

    def of(self, classes: Tensor) -> Tensor:
        """For each of (n,) indices of `classes`, a row of that class."""
        offset = (torch.rand(len(classes), generator=self.generator) * self._counts[classes]).long()
        return self._order[self._starts[classes] + offset]


def calibrated(
    reference: Reference,
    rows: ArrayLike,
    labels: Tensor | None = None,
    inputs: ArrayLike | None = None,
    *,
    windows: int = 24,
    blocks: int = 200,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Reference:
    """The reference with the thresholds of its own healthy traffic, resampled in blocks from the rows (n, d) that gave
    its band energies.

    labels (n,): what sessions and drift are of; without them, or with one only, the octants of the leading directions.
    inputs (n, k): the descriptors of the same rows' inputs, which make the reference know its inputs too. progress:
    called with the windows and blocks done so far, and how many there are. The effective rank, on which no rule of the
    verdict rests, is measured in one window of four. Of more than 12,288 rows so many are drawn from. ValueError names
    an argument of the wrong shape, and fewer than 1024 rows: too few to know how far healthy statistics stray.
    """
    z = unit(as_rows(rows, reference.dimension)).float()
    if len(z) < MINIMUM_ROWS:
        raise ValueError(f"rows: expected at least {MINIMUM_ROWS} to calibrate on, got {len(z)}")
    if labels is None or (len(labels) == len(z) and bool((labels == labels[0]).all())):
        leading = z @ reference.basis[:, :3].float()
        labels = (leading > leading.median(0).values).long() @ torch.tensor([1, 2, 4])[: leading.shape[1]]
    if labels.shape != (len(z),):
        raise ValueError(f"labels: expected shape ({len(z)},), got {tuple(labels.shape)}")
    if labels.is_floating_point() and bool(labels.isnan().any()):
        raise ValueError("labels: expected a class for each row, got NaN")
    descriptors = None if inputs is None else as_rows(inputs, name="inputs").float()
    if descriptors is not None and len(descriptors) != len(z):
        raise ValueError(f"inputs: expected {len(z)} rows, got {len(descriptors)}")
    if descriptors is not None:
        reference = replace(reference, inputs=InputReference.build(descriptors))
    given = len(z)
    if given > MOST_ROWS:
        kept = torch.randperm(given, generator=Generator().manual_seed(seed))[:MOST_ROWS].sort().values
        z, labels, descriptors = z[kept], labels[kept], None if descriptors is None else descriptors[kept]
    traffic = Traffic(labels, seed)
    position = Generator().manual_seed(seed)
    laws = traffic.laws()
    kinds = range(len(traffic.classes))
    pool = Pool(reference, z, descriptors)
    total = len(laws) * blocks + len(WINDOWS) * (len(laws) * windows + len(kinds))
    done = 0

    def step(count: int = 1) -> None:
        nonlocal done
        done += count
        progress(done, total)

    def at() -> int:
        return int(torch.randint(DAY, (1,), generator=position))

    single = [torch.stack(list(_blocks(pool, law, blocks, at, step))) for law in laws]
    tables = [_table(single, torch.full((2, single[0].shape[1]), math.nan, dtype=torch.float64), BLOCK_ROWS / given)]
    draws: list[Tensor] = []
    for n in WINDOWS:
        draws += [torch.stack([law(n, at()) for _ in range(windows)]) for law in laws]
        draws.append(torch.stack([traffic.narrow(n, kind) for kind in kinds]))
    measured = pool.statistics(draws)
    count = len(laws) + 1
    for i, n in enumerate(WINDOWS):
        part = slice(i * count, (i + 1) * count)
        *healthy, narrow = measured[part]
        *drawn, one_kind = draws[part]
        for values, indices in zip(healthy, drawn, strict=True):
            _rank_some(pool, values, indices)
            _correlate(pool, values, indices, PAIRS_EVERY)
            step(windows)
        _rank_all(pool, narrow, one_kind)
        _correlate(pool, narrow, one_kind, 1)
        step(len(kinds))
        tables.append(_table(healthy, torch.stack((narrow.amin(0), narrow.amax(0))), n / given))
    columns_of = (torch.stack(column) for column in zip(*tables, strict=True))
    return replace(reference, calibration=Calibration((BLOCK_ROWS, *WINDOWS), *columns_of))


def _table(laws: list[Tensor], extremes: Tensor, share: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """centre, spread, low and high (s,) of a `Calibration` at one number of rows: from the statistics (w, s) of windows
    of each law, the extremes (2, s) of narrow traffic, and the rows of a window over those of the reference."""
    means, variances = (torch.stack(each) for each in zip(*map(_mean_and_variance, laws), strict=True))
    centre = means.mean(0)
    # The reference was measured on rows that are themselves a sample.
    own = variances[0] * share
    spread = (variances.amax(0) + (means - centre).square().amax(0) + own).sqrt()
    return centre, spread, extremes[0], extremes[1]


def _mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of windows' statistics (w, s), each over those that measured it; NaN where the rows did not determine it."""
    measured = values.isinf().logical_not()
    count = measured.sum(0)
    kept = torch.where(measured, values, 0.0)
    mean = kept.sum(0) / count
    return mean, torch.where(measured, values - mean, 0.0).square().sum(0) / (count - 1)


def _rank_some(pool: Pool, values: Tensor, draw: Tensor) -> None:
    """Put the effective rank of one healthy window in four into the statistics (w, s) of the windows (w, n)."""
    column = values.shape[1] - len(NAMED) + NAMED.index("effective_rank")
    every = SPECTRUM_EVERY if len(draw) >= 3 * SPECTRUM_EVERY else 1
    for i in range(0, len(draw), every):
        values[i, column] = log_ratio(pool.effective_rank(draw[i]) / pool.reference.effective_rank)
        # Where the first window does not determine the rank, the mean over windows is not known either.
        if bool(values[i, column].isnan()):
            return


def _correlate(pool: Pool, values: Tensor, draw: Tensor, every: int) -> None:
    """Put how rows follow their inputs, in one window of so many, into the statistics (w, s) of the windows (w, n).

    A window of too few different inputs says nothing, and takes the largest value of the others.
    """
    column = values[:, values.shape[1] - len(NAMED) + NAMED.index("input_correlation")]
    for i in range(0, len(draw), every):
        column[i] = pool.input_correlation(draw[i])
    known = column[column.isfinite()]
    column[column.isnan()] = float(known.max()) if len(known) else math.nan


def _rank_all(pool: Pool, values: Tensor, draw: Tensor) -> None:
    """Put the numerical rank of each narrow window into the statistics (w, s) of the windows (w, n); NaN into all where
    one has too few rows for it, for then their least is not known. Their effective rank is of no use: NaN."""
    first = values.shape[1] - len(NAMED)
    values[:, first + NAMED.index("effective_rank")] = math.nan
    column = first + NAMED.index("numerical_rank")
    for i, window in enumerate(draw):
        values[i, column] = pool.numerical_rank(window) / pool.reference.numerical_rank
        if bool(values[i, column].isnan()):
            values[:, column] = math.nan
            return


def _blocks(
    pool: Pool, law: Callable[[int, int], Tensor], count: int, at: Callable[[], int], step: Callable[[], None]
) -> Iterator[Tensor]:
    """Statistics of single blocks, as the sequential test sees them: the participation ratio from products of pairs."""
    reference = pool.reference
    previous = None
    for _ in range(count + 1):
        block = pool.rows[law(BLOCK_ROWS, at())]
        centred = profile.centred(block)
        if previous is not None:
            trace, frobenius = profile.block_products(centred, previous)
            named = {"participation_ratio": log_ratio(trace / frobenius / reference.participation_ratio)}
            energies = profile.energies_of_rows(centred, None) / BLOCK_ROWS
            # The mean's distance is the same in any orthonormal basis.
            mean = block.mean(0, dtype=torch.float64) + reference.mean
            yield columns(reference, energies, mean, BLOCK_ROWS, named)
            step()
        previous = centred
