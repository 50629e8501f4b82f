"""Streams of healthy blocks, many at once, as the sequential test and the verdict's window see them."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from benchmarks.detection.runs import BLOCKS_A_DAY, LEADING, Law, Sums, outer
from fullrank import Reference, profile
from fullrank.calibration.ranges import BLOCK_ROWS, NAMED
from fullrank.calibration.sequential import LEVEL, Detector
from fullrank.moments import Moments
from fullrank.monitor.window import Block
from fullrank.statistics import measure, norm_histogram
from fullrank.verdict import BAND_GONE, diagnose, thresholds

WINDOW, GROUP = 24, 3  # blocks
LANES, STEPS = 32, 32  # streams, and blocks of each that are worked on at a time
# Windows of a law that the library is asked about, at most; after so many each suspicious one counts as an alarm.
MOST_ASKED = 200
ASKED_ANYWAY = 1
# What the products that are left out may add to the participation ratio of a window.
MARGIN = 1.02


@dataclass
class Tally:
    """What a law's streams of blocks did."""

    law: str
    blocks: int = 0
    sequential: int = 0  # blocks at which the sequential test alarms
    window: int = 0  # blocks at which the window's verdict is not healthy
    pages: int = 0  # runs of such blocks
    asked: int = 0  # windows handed to the library
    peak: float = -math.inf  # log10 of the most evidence


class Streams:
    """One law's blocks. Tensors are (streams, blocks, ...); `rows` are the unit rows (n, d) that the law draws from."""

    def __init__(self, reference: Reference, law: Law, rows: Tensor, seed: int) -> None:
        self.reference, self.law, self.rows = reference, law, rows
        self.generator = Generator().manual_seed(seed)
        self.detector = Detector(reference)
        self.limit = thresholds(reference, WINDOW * BLOCK_ROWS)
        self.wealth = torch.zeros(2, LANES, len(self.detector.names), dtype=torch.float64)
        self.kept: tuple[Tensor, ...] = ()
        self.alarmed = torch.zeros(LANES, dtype=torch.bool)
        self.tally = Tally(law.name)
        # Streams begin at different times of the day.
        self.start = (torch.arange(LANES) * (BLOCKS_A_DAY / LANES)).long()

    def take(self) -> None:
        """The next blocks of each stream. Kept from before: as many as a window reaches back."""
        at = self.start[:, None] + self.tally.blocks // LANES + torch.arange(STEPS)
        runs = self.law.draw(at.flatten(), self.generator)
        sums = self.law.sums(runs)
        fresh = tuple(each.view(LANES, STEPS, -1) for each in (runs, sums.linear, sums.squares, sums.products))
        known = tuple(torch.cat(pair, 1) for pair in zip(self.kept, fresh, strict=True)) if self.kept else fresh
        self.kept = tuple(each[:, 1 - WINDOW :] for each in known)
        runs, *rest = known
        sums = Sums(BLOCK_ROWS, rest[0].double(), rest[1].double(), rest[2])
        energies = variances(sums)
        alarms = self._sequential(block_statistics(self.reference, sums, energies)[:, -STEPS:])
        wrong = self._windows(runs, sums, energies)
        bad = alarms | wrong
        self.tally.pages += int((bad & ~torch.cat((self.alarmed[:, None], bad[:, :-1]), 1)).sum())
        self.alarmed = bad[:, -1]
        self.tally.blocks += LANES * STEPS
        self.tally.sequential += int(alarms.sum())
        self.tally.window += int(wrong.sum())

    def _sequential(self, statistics: Tensor) -> Tensor:
        """(streams, blocks) whether the e-detector alarms: `Detector.bet`, for all streams at once."""
        detector = self.detector
        path = []
        for evalues in detector.evalues(statistics[..., detector.columns]).unbind(2):
            self.wealth = (self.wealth.clamp(min=0) + evalues).clamp(max=detector.most)
            path.append(torch.logsumexp(self.wealth, (0, 2)) - math.log(2 * len(detector.names)))
        logs = torch.stack(path, 1)
        self.tally.peak = max(self.tally.peak, float(logs.max()) / math.log(10))
        return logs >= math.log(LEVEL)

    def _windows(self, runs: Tensor, sums: Sums, energies: Tensor) -> Tensor:
        """(streams, blocks) whether the verdict on the window ending with each new block is not healthy."""
        suspicious = beyond(self.reference, self.limit, sums, energies)
        wrong = torch.zeros(LANES, STEPS, dtype=torch.bool)
        missing = STEPS - suspicious.shape[1]
        asked = suspicious.clone()
        if missing > 0:
            asked[:ASKED_ANYWAY, 0] = True
        for lane, first in asked.nonzero().tolist():
            if self.tally.asked < MOST_ASKED:
                self.tally.asked += 1
                state = self._verdict(runs[lane, first : first + WINDOW])
                wrong[lane, missing + first] = state != "healthy"
            else:
                wrong[lane, missing + first] = suspicious[lane, first]
        return wrong

    def _verdict(self, runs: Tensor) -> str:
        """The library's verdict on a window of blocks of runs (24, 4)."""
        groups = []
        for index in torch.split(self.law.rows_of(runs), GROUP):
            moments = Moments(self.reference.dimension, self.reference.mean)
            energies = torch.zeros(self.reference.dimension, dtype=torch.float64)
            for block in self.rows[index]:
                moments.add(block)
                energies += profile.energies_of_rows(profile.centred(block), self.reference.basis.to(block.dtype))
            groups.append(Block(0.0, 0.0, moments, energies, norm_histogram(torch.ones(GROUP * BLOCK_ROWS))))
        window = measure(300.0, groups, self.reference, self.reference.dimension)
        return diagnose({300.0: window}, self.reference).state


def variances(sums: Sums) -> Tensor:
    """(..., d) the variance of blocks along each direction."""
    return profile.energies_of_sums(sums.squares, sums.linear.square(), sums.rows) / sums.rows


def per_band(energies: Tensor, bands: tuple[int, ...]) -> Tensor:
    """(..., d) -> (..., bands): `profile.band_sums` of many."""
    sizes = profile.band_sizes(bands).tolist()
    return torch.stack([part.sum(-1) for part in torch.split(energies, sizes, -1)], -1)


def block_statistics(reference: Reference, sums: Sums, energies: Tensor) -> Tensor:
    """(streams, blocks, s) statistics of single blocks in a `Calibration`'s columns; of the first of each stream
    without the participation ratio, which needs the one before."""
    n = sums.rows
    bands = per_band(energies, reference.bands)
    variance = energies.sum(-1)
    products = (sums.products - outer(sums.linear.float() / math.sqrt(n))) / (n - 1)
    rest = energies[..., LEADING:]
    frobenius = (products[:, 1:] * products[:, :-1]).sum(-1).double() + (rest[:, 1:] * rest[:, :-1]).sum(-1)
    ratio = F.pad(variance[:, 1:] * variance[:, :-1] / frobenius, (1, 0), value=math.nan)
    shift = ((sums.linear / n).square().sum(-1) - variance / n) / reference.total_variance
    named = {
        "head": (profile.head_sum(bands) / profile.head_sum(reference.band_energy)).log(),
        "participation_ratio": (ratio / reference.participation_ratio).log(),
        "total_variance": (variance / reference.total_variance).log(),
        "mean_shift": shift.clamp(min=0).sqrt(),
    }
    unknown = torch.full_like(variance, math.nan)
    ratios = (bands / reference.band_energy).clamp(min=1e-3).log()
    return torch.cat((ratios, torch.stack([named.get(name, unknown) for name in NAMED], -1)), -1)


def beyond(reference: Reference, limit: dict[str, float], sums: Sums, energies: Tensor) -> Tensor:
    """(streams, windows) whether an estimate of a window of 24 blocks is beyond a threshold of the verdict."""
    n = WINDOW * sums.rows
    bands = _rolled(per_band(energies, reference.bands)) / WINDOW
    mean = _rolled(sums.linear) / n
    each = (_rolled(sums.squares) - n * mean.square()) / (n - 1)
    variance = each.sum(-1)
    products = (_rolled(sums.products) - outer(mean.float() * math.sqrt(n))) / (n - 1)
    frobenius = products.square().sum(-1).double() + each[..., LEADING:].square().sum(-1)
    half = profile.head_bands(len(reference.bands))
    tail = (bands / reference.band_energy)[..., half:]
    head = profile.head_sum(bands) / profile.head_sum(reference.band_energy)
    shift = (mean.square().sum(-1) - variance / n) / reference.total_variance
    # `profile.tail_shift` of many.
    sizes = profile.band_sizes(reference.bands)[half:]
    units = reference.band_energy[half:] / sizes
    moved = (per_band(mean.square(), reference.bands)[..., half:] / units).sum(-1)
    sampling = (bands[..., half:] / units).sum(-1) / n + sizes.sum() / reference.rows
    tail_shift = (moved - sampling) / sizes.sum()
    return (
        (variance < limit["total_variance"])
        | (variance.square() / frobenius < MARGIN * limit["participation_ratio"])
        | (head < limit["head_energy_ratio_low"])
        | (tail.amax(-1) > limit["tail_energy_ratio_high"])
        | (tail.amin(-1) < BAND_GONE)
        | (tail[..., -1] < limit["tail_energy_ratio_low"])
        | (shift > limit["mean_shift_ratio"])
        | (tail_shift > limit["tail_shift"])
    )


def _rolled(values: Tensor) -> Tensor:
    """(streams, blocks, ...) -> (streams, blocks - 23, ...): sums over the last 24 blocks."""
    total = F.pad(values.cumsum(1), (0, 0, 1, 0))
    return total[:, WINDOW:] - total[:, :-WINDOW]
