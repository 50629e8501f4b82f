"""Resamples healthy traffic from healthy rows, and calibrates a reference on it."""

import math
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Generator, Tensor

from fullrank import measures, profile
from fullrank.calibration.enough import MINIMUM_ROWS
from fullrank.calibration.inputs import InputReference
from fullrank.calibration.ranges import BLOCK_ROWS, NAMED, Calibration
from fullrank.moments import Moments, Traces
from fullrank.profile import band_sums
from fullrank.reference import Reference
from fullrank.rows import ArrayLike, as_rows, unit

SESSION = 32
# A day at 20 rows a second.
DAY = 86_400 * 20
_FLOOR = 1e-3
WINDOWS = (1024, 6144)
# One window in so many has its eigenvalues computed.
SPECTRUM_EVERY = 3
_PANEL = 256


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
        return self._of(runs.repeat_interleave(SESSION)[:n])

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
        return self._of(torch.full((n,), which))

    def laws(self) -> tuple[Callable[[int, int], Tensor], ...]:
        """The three kinds of healthy traffic, each (n, at) -> (n,) indices."""
        return self.independent, self.sessions, self.drifting

    def _of(self, classes: Tensor) -> Tensor:
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
    called with the windows and blocks done so far, and how many there are. What needs eigenvalues is measured in one
    window of three; no threshold of the verdict rests on those. ValueError names an argument of the wrong shape, and
    fewer than 1024 rows: too few to know how far healthy statistics stray.
    """
    z = unit(as_rows(rows, reference.dimension)).float()
    if len(z) < MINIMUM_ROWS:
        raise ValueError(f"rows: expected at least {MINIMUM_ROWS} to calibrate on, got {len(z)}")
    if labels is None or (len(labels) == len(z) and bool((labels == labels[0]).all())):
        leading = z @ reference.basis[:, :3].float()
        labels = (leading > leading.median(0).values).long() @ torch.tensor([1, 2, 4])[: leading.shape[1]]
    if labels.shape != (len(z),):
        raise ValueError(f"labels: expected shape ({len(z)},), got {tuple(labels.shape)}")
    descriptors = None if inputs is None else as_rows(inputs, name="inputs").float()
    if descriptors is not None and len(descriptors) != len(z):
        raise ValueError(f"inputs: expected {len(z)} rows, got {len(descriptors)}")
    if descriptors is not None:
        reference = replace(reference, inputs=InputReference.build(descriptors))
    traffic = Traffic(labels, seed)
    position = Generator().manual_seed(seed)
    laws_drawn = len(traffic.laws())
    total = laws_drawn * blocks + len(WINDOWS) * (laws_drawn * windows + len(traffic.classes))
    done = 0
    # In the reference's coordinates once, which moves no statistic: what is drawn needs no product with the basis.
    projected = z @ reference.basis.float()
    rank = len(reference.bands) + NAMED.index("effective_rank")

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    def drawn(law: Callable[[int, int], Tensor], n: int, count: int, *, narrow: bool = False) -> Tensor:
        values: list[Tensor] = []
        for i in range(count):
            index = law(n, int(torch.randint(DAY, (1,), generator=position)))
            described = None if descriptors is None else descriptors[index]
            # Where the first window does not determine the rank, the mean over windows is not known either.
            hopeless = i > 0 and bool(values[0][rank].isnan())
            spectrum = narrow or (not hopeless and (i % SPECTRUM_EVERY == 0 or count < 3 * SPECTRUM_EVERY))
            dtype = torch.float64 if narrow else torch.float32
            values.append(_statistics(reference, projected, index, described, dtype, spectrum=spectrum))
            step()
        return torch.stack(values)

    tables: list[tuple[Tensor, ...]] = []
    for n in (BLOCK_ROWS, *WINDOWS):
        if n == BLOCK_ROWS:
            laws = [
                torch.stack(list(_blocks(reference, projected, law, blocks, position, step))) for law in traffic.laws()
            ]
        else:
            laws = [drawn(law, n, windows) for law in traffic.laws()]
        means, variances = (torch.stack(each) for each in zip(*map(_mean_and_variance, laws), strict=True))
        centre = means.mean(0)
        # The reference was measured on rows that are themselves a sample.
        own = variances[0] * n / len(z)
        spread = (variances.amax(0) + (means - centre).square().amax(0) + own).sqrt()
        kinds = range(len(traffic.classes))
        if n == BLOCK_ROWS:
            extremes = torch.full((2, len(centre)), math.nan, dtype=torch.float64)
        else:
            narrow = torch.cat([drawn(lambda m, _, c=c: traffic.narrow(m, c), n, 1, narrow=True) for c in kinds])  # type: ignore[misc]
            extremes = torch.stack((narrow.amin(0), narrow.amax(0)))
        tables.append((centre, spread, *extremes))
    centre, spread, low, high = (torch.stack(columns) for columns in zip(*tables, strict=True))
    return replace(reference, calibration=Calibration((BLOCK_ROWS, *WINDOWS), centre, spread, low, high))


def _mean_and_variance(values: Tensor) -> tuple[Tensor, Tensor]:
    """Of windows' statistics (w, s), each over those that measured it; NaN where the rows did not determine it."""
    measured = values.isinf().logical_not()
    count = measured.sum(0)
    kept = torch.where(measured, values, 0.0)
    mean = kept.sum(0) / count
    return mean, torch.where(measured, values - mean, 0.0).square().sum(0) / (count - 1)


def window_statistics(reference: Reference, rows: Tensor, inputs: Tensor | None) -> Tensor:
    """The statistics of a `Calibration`'s columns for a window of unit rows (n, d) and their descriptors (n, k)."""
    every = torch.arange(len(rows))
    return _statistics(reference, rows @ reference.basis.to(rows.dtype), every, inputs, torch.float64, spectrum=True)


def _statistics(
    reference: Reference,
    projected: Tensor,
    index: Tensor,
    inputs: Tensor | None,
    dtype: torch.dtype,
    *,
    spectrum: bool,
) -> Tensor:
    """The statistics of a `Calibration`'s columns for a window of the rows at `index` (n,), in the reference's
    coordinates (m, d); products of rows in `dtype`. Without a spectrum, what needs one is infinite: not measured."""
    drawn = projected[index]
    n = len(drawn)
    blocks = [block for block in torch.split(drawn, BLOCK_ROWS) if len(block) > 1]
    energies = sum(profile.energies_of_rows(profile.centred(block), None) for block in blocks)
    assert isinstance(energies, Tensor)
    sizes = torch.tensor([len(block) for block in blocks], dtype=torch.float64)
    mean = sizes @ torch.stack([block.mean(0, dtype=torch.float64) for block in blocks]) / sizes.sum()
    # A row that was drawn twice is one row of twice the weight.
    distinct, counts = torch.unique(index, return_counts=True)
    rows = (projected[distinct] - mean).to(dtype)
    covariance = _scatter(rows * counts.sqrt().to(dtype)[:, None]) / (n - 1)
    squares = rows.double().square().sum(1)
    trace, fourth = (float(counts.double() @ squares**power) / (n - 1) for power in (1, 2))
    traces = Traces(n, reference.dimension, trace, float(torch.linalg.vector_norm(covariance)) ** 2, fourth)
    named = {
        "participation_ratio": _log(traces.participation_ratio / reference.participation_ratio),
        "effective_rank": math.inf,
        "numerical_rank": math.inf,
    }
    if spectrum:
        eigenvalues = measures.spectrum(covariance)
        rank = measures.numerical_rank(eigenvalues, reference.noise_floor)
        named["effective_rank"] = _log(traces.effective_rank(eigenvalues) / reference.effective_rank)
        # Fewer distinct rows than the reference has directions cannot say how many of them are silent.
        spanned = len(distinct) > reference.numerical_rank
        named["numerical_rank"] = rank / reference.numerical_rank if spanned else math.nan
    if inputs is not None and reference.inputs is not None:
        described = Moments(reference.inputs.width).add(inputs)
        named["input_distance"] = reference.inputs.read(described).distance
    return columns(reference, energies / n, reference.basis @ mean, n, named)


def _scatter(rows: Tensor) -> Tensor:
    """Y^T Y of rows (n, d), float64: the lower triangle in panels, mirrored, which is half of the work."""
    d = rows.shape[1]
    scatter = torch.empty(d, d, dtype=torch.float64)
    for start in range(0, d, _PANEL):
        panel = slice(start, start + _PANEL)
        part = rows[:, start:].T @ rows[:, panel]
        scatter[start:, panel] = part
        scatter[panel, start:] = part.T
    return scatter


def columns(
    reference: Reference, energies: Tensor, mean: Tensor, n: int, named: dict[str, float] | None = None
) -> Tensor:
    """The statistics of `Calibration`'s columns from n rows' variances along the reference's directions (d,) and their
    mean (d,); what is not `named` and does not follow from these is NaN."""
    sums = band_sums(energies, reference.bands)
    variance = float(energies.sum())
    shift = profile.mean_shift(mean, reference.mean, variance, n, reference.total_variance)
    values = {
        "head": _log(float(profile.head_sum(sums) / profile.head_sum(reference.band_energy))),
        "total_variance": _log(variance / reference.total_variance),
        "mean_shift": math.sqrt(max(0.0, shift)),
    } | (named or {})
    ratios = (sums / reference.band_energy).clamp(min=_FLOOR).log()
    return torch.cat((ratios, torch.tensor([values.get(name, math.nan) for name in NAMED], dtype=torch.float64)))


def _log(ratio: float) -> float:
    return math.log(max(ratio, _FLOOR)) if math.isfinite(ratio) else math.nan


def _blocks(
    reference: Reference,
    projected: Tensor,
    law: Callable[[int, int], Tensor],
    count: int,
    position: Generator,
    step: Callable[[], None],
) -> Iterator[Tensor]:
    """Statistics of single blocks, as the sequential test sees them: the participation ratio from products of pairs."""
    previous = None
    for _ in range(count + 1):
        block = projected[law(BLOCK_ROWS, int(torch.randint(DAY, (1,), generator=position)))]
        centred = profile.centred(block)
        if previous is not None:
            trace, frobenius = profile.block_products(centred, previous)
            ratio = trace / frobenius / reference.participation_ratio
            energies = profile.energies_of_rows(centred, None) / BLOCK_ROWS
            named = {"participation_ratio": _log(ratio)}
            mean = reference.basis @ block.mean(0, dtype=torch.float64)
            yield columns(reference, energies, mean, BLOCK_ROWS, named)
            step()
        previous = centred
