"""Statistics of many windows that are drawn from the same rows, for all of them at once.

A window is how often it holds each row. What is a sum over its rows is then a product with these counts, and the
squares of all pairs of rows, which the participation ratio needs, are computed once and not in each window.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fullrank import measures, profile
from fullrank.calibration.inputs import InputReading
from fullrank.calibration.ranges import BLOCK_ROWS, NAMED
from fullrank.dependence import input_correlation
from fullrank.moments import Traces
from fullrank.neighbours import between
from fullrank.profile import band_sums
from fullrank.reference import Reference
from fullrank.sample import SAMPLE_ROWS, thinned

_FLOOR = 1e-3
_PANEL = 256


class Pool:
    """Healthy rows, from which windows are drawn.

    rows: (m, d) float32, in the reference's directions about its mean, which moves no statistic; described: (m, k)
    float64 descriptors of their inputs, in the directions of the reference's inputs about their mean, or None.
    """

    def __init__(self, reference: Reference, rows: Tensor, descriptors: Tensor | None) -> None:
        self.reference = reference
        self.rows = (rows - reference.mean.float()) @ reference.basis.float()
        self.described: Tensor | None = None
        if descriptors is not None and reference.inputs is not None:
            self.described = reference.inputs.project(reference.inputs.bounded(descriptors.double()))

    def statistics(self, draws: Sequence[Tensor]) -> list[Tensor]:
        """For each draw, windows (w, n) of indices into the rows with n a multiple of 256: their statistics (w, s) in a
        `Calibration`'s columns, float64, but the ranks and the inputs' correlation, which are infinite here: not
        measured."""
        counts = [_counts(draw, len(self.rows)) for draw in draws]
        products = torch.split(self._products(torch.cat(counts)), [len(draw) for draw in draws])
        return [self._measured(*each) for each in zip(draws, counts, products, strict=True)]

    def effective_rank(self, window: Tensor) -> float:
        """The effective rank of a window (n,), in float32: the spectrum's small end, where that rounds, adds nothing.
        NaN where the rows do not determine it."""
        rows, weights = self._about_its_mean(window)
        n = len(window)
        d = self.reference.dimension
        scaled = rows * weights.sqrt()[:, None].float()
        # Fewer rows than dimensions: their products have the same eigenvalues, but for zeros.
        products = scatter(scaled if len(rows) >= d else scaled.T) / (n - 1)
        eigenvalues = F.pad(measures.spectrum(products).double(), (0, d - len(products)))
        squares = rows.double().square().sum(1)
        trace, fourth = (float(weights @ squares**power) / (n - 1) for power in (1, 2))
        traces = Traces(n, d, trace, float(products.double().square().sum()), fourth)
        return traces.effective_rank(eigenvalues)

    def numerical_rank(self, window: Tensor) -> float:
        """The numerical rank of a window (n,), in float64; NaN where its distinct rows are too few to span the
        reference's directions, and so cannot say how many of them are silent."""
        if len(torch.unique(window)) <= self.reference.numerical_rank:
            return math.nan
        rows, weights = self._about_its_mean(window)
        scaled = rows.double() * weights.sqrt()[:, None]
        eigenvalues = measures.spectrum(scaled.T @ scaled / (len(window) - 1))
        return measures.numerical_rank(eigenvalues, self.reference.noise_floor)

    def input_correlation(self, window: Tensor) -> float:
        """How a sample of a window (n,) follows its inputs, as a monitor samples it; NaN without descriptors."""
        known = self.reference.inputs
        if self.described is None or known is None:
            return math.nan
        few = thinned(window, SAMPLE_ROWS)
        shown = self.described[few, : known.width]
        return input_correlation(between(self.rows[few]), between(shown), known.reach).estimate

    def _about_its_mean(self, window: Tensor) -> tuple[Tensor, Tensor]:
        """The distinct rows of a window (n,) about its mean, and how often each comes, float64."""
        distinct, counts = torch.unique(window, return_counts=True)
        weights = counts.double()
        rows = self.rows[distinct]
        return rows - (weights @ rows.double() / len(window)).float(), weights

    def _products(self, counts: Tensor) -> Tensor:
        """(w, m) -> (w,) the squared norm of each window's sum of outer products, which is the sum over pairs of its
        rows of their squared inner product."""
        total = torch.zeros(len(counts), dtype=torch.float64)
        for start in range(0, len(self.rows), _PANEL):
            panel = slice(start, start + _PANEL)
            squares = (self.rows[start:] @ self.rows[panel].T).square_()
            # A pair of rows counts twice, a row with itself once; within the panel both orders are there.
            both = counts[:, start:].clone()
            both[:, _PANEL:] *= 2
            total += ((both @ squares) * counts[:, panel]).double().sum(1)
        return total

    def _measured(self, draw: Tensor, counts: Tensor, products: Tensor) -> Tensor:
        """The statistics of windows (w, n) with their counts (w, m) and the norms of their outer products (w,)."""
        windows, n = draw.shape
        blocks = F.embedding_bag(draw.reshape(-1, BLOCK_ROWS), self.rows, mode="sum")
        sums = blocks.double().view(windows, -1, self.rows.shape[1])
        squares = torch.zeros(windows, self.rows.shape[1], dtype=torch.float64)
        means = sums.sum(1) / n
        lengths = means.square().sum(1)
        trace = torch.zeros(windows, dtype=torch.float64)
        fourth = torch.zeros_like(trace)
        along = torch.zeros_like(trace)
        for start in range(0, len(self.rows), _PANEL):
            panel = slice(start, start + _PANEL)
            weights = counts[:, panel].double()
            rows = self.rows[panel].double()
            own = rows.square()
            squares += weights @ own
            dots = means @ rows.T
            distances = (own.sum(1) - 2 * dots + lengths[:, None]).clamp(min=0)
            trace += (weights * distances).sum(1)
            fourth += (weights * distances.square()).sum(1)
            along += (weights * dots.square()).sum(1)
        energies = profile.energies_of_sums(squares, sums.square().sum(1), BLOCK_ROWS) / n
        frobenius = products - 2 * n * along + (n * lengths).square()
        inputs = self._inputs(counts.double(), n)
        statistics = []
        for i in range(windows):
            traces = Traces(
                n,
                self.reference.dimension,
                float(trace[i]) / (n - 1),
                float(frobenius[i]) / (n - 1) ** 2,
                float(fourth[i]) / (n - 1),
            )
            named = {
                "participation_ratio": log_ratio(traces.participation_ratio / self.reference.participation_ratio),
                "effective_rank": math.inf,
                "numerical_rank": math.inf,
                "input_correlation": math.inf,
                "input_distance": inputs[i].distance,
                "texture_shift": inputs[i].texture_shift,
                # These rows gave the reference's mean: it has no sampling error of its own towards them.
                "tail_shift": tail_shift(self.reference, means[i], energies[i], n, math.inf),
            }
            # The mean's distance is the same in any orthonormal basis.
            statistics.append(columns(self.reference, energies[i], means[i] + self.reference.mean, n, named))
        return torch.stack(statistics)

    def _inputs(self, counts: Tensor, n: int) -> list[InputReading]:
        """(w, m) -> how the inputs of w windows differ from the reference's; unknown without descriptors."""
        known = self.reference.inputs
        if self.described is None or known is None:
            return [InputReading()] * len(counts)
        means = counts @ self.described / n
        energies = (counts @ self.described.square() - n * means.square()) / (n - 1)
        return [known.compare(mean, energy, n) for mean, energy in zip(means, energies, strict=True)]


def columns(
    reference: Reference, energies: Tensor, mean: Tensor, n: int, named: dict[str, float] | None = None
) -> Tensor:
    """The statistics of `Calibration`'s columns from n rows' variances along the reference's directions (d,) and their
    mean (d,); what is not `named` and does not follow from these is NaN."""
    sums = band_sums(energies, reference.bands)
    variance = float(energies.sum())
    shift = profile.mean_shift(mean, reference.mean, variance, n, reference.total_variance)
    values = {
        "head": log_ratio(float(profile.head_sum(sums) / profile.head_sum(reference.band_energy))),
        "total_variance": log_ratio(variance / reference.total_variance),
        "mean_shift": math.sqrt(max(0.0, shift)),
    } | (named or {})
    ratios = (sums / reference.band_energy).clamp(min=_FLOOR).log()
    return torch.cat((ratios, torch.tensor([values.get(name, math.nan) for name in NAMED], dtype=torch.float64)))


def tail_shift(reference: Reference, along: Tensor, energies: Tensor, n: int, reference_rows: float) -> float:
    """`profile.tail_shift` of a shift of the mean (d,) along the reference's directions and the rows' variances (d,)
    there."""
    variances = band_sums(energies, reference.bands)
    return profile.tail_shift(along, reference.bands, reference.band_energy, variances, n, reference_rows)


def log_ratio(ratio: float) -> float:
    """The logarithm of a ratio, of 0.001 at least; NaN for one that is not known."""
    return math.log(max(ratio, _FLOOR)) if math.isfinite(ratio) else math.nan


def scatter(rows: Tensor) -> Tensor:
    """Y^T Y of rows (n, d): the lower triangle in panels, mirrored, which is half of the work."""
    d = rows.shape[1]
    product = torch.empty(d, d, dtype=rows.dtype)
    for start in range(0, d, _PANEL):
        panel = slice(start, start + _PANEL)
        part = rows[:, start:].T @ rows[:, panel]
        product[start:, panel] = part
        product[panel, start:] = part.T
    return product


def _counts(draw: Tensor, rows: int) -> Tensor:
    """(w, n) indices -> (w, rows) how often each window holds each row, float32."""
    return torch.stack([torch.bincount(window, minlength=rows) for window in draw]).float()
