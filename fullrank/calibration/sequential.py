"""Sequential test: has the traffic strayed from healthy traffic, and since when?

Each block gives a few cheap statistics: band energies, their sum, the participation ratio of neighbouring blocks
and the shift of the mean. Each statistic is standardised by its mean and spread on healthy blocks. On either side
it then bets that it lies beyond a tolerance. The tolerance is the effect below which nothing matters, and no less
than healthy windows stray. A bet is an e-value: its expectation is at most 1 whatever healthy traffic does within
the tolerance, provided the noise is sub-Gaussian with the calibrated spread, which is inflated for the doubt.

The e-detector is the mean over statistics of e-CUSUMs M_t = max(1, M_{t-1}) e_t (Shin, Ramdas & Rinaldo 2023,
"E-detectors", definition 2.5). From E[M_t] <= t follows a mean time to a false alarm of at least the level, in blocks,
whatever the dependence between the statistics.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fullrank.calibration.ranges import BLOCK_ROWS, LEAST_EFFECT, NAMED
from fullrank.calibration.windows import columns
from fullrank.reference import Reference

# Mean blocks to a false alarm, at least: at 12.8 s a block, 40 years.
LEVEL = 1e8
TOLERANCE_DEVIATIONS = 4.0
SPREAD_INFLATION = 1.25
STAKES = (0.5, 1.0, 2.0, 4.0)
# One block, however odd, is no more than a third of the evidence that an alarm needs.
_CAP = math.log(LEVEL) / 3 + 1
_SIGNALS = ("participation_ratio", "total_variance", "mean_shift")


@dataclass(frozen=True)
class Evidence:
    """Evidence against healthy traffic, and what gives it.

    log10: of the e-detector's value, capped; signal: the statistic with most of it ("band 64 high"); since: when the
    first block of that statistic's present run began. That block may hold rows of before the change; later ones do
    not.
    """

    log10: float = math.nan
    signal: str = ""
    since: float = math.nan

    @property
    def alarm(self) -> bool:
        """Whether the evidence exceeds the level."""
        return self.log10 >= math.log10(LEVEL)


class Detector:
    """The e-detector of a calibrated reference. Give it blocks in order. ValueError for one without a calibration."""

    def __init__(self, reference: Reference) -> None:
        calibration = reference.calibration
        if calibration is None:
            raise ValueError("reference: not calibrated")
        self.reference = reference
        bands = len(reference.bands)
        used = [*range(bands), *(bands + NAMED.index(name) for name in _SIGNALS)]
        self.columns = torch.tensor(used)
        self.names = [f"band {last}" for last in reference.bands] + [name.replace("_", " ") for name in _SIGNALS]
        self._centre = calibration.centre[0, used]
        self._spread = (SPREAD_INFLATION * calibration.spread[0, used]).clamp(min=1e-3)
        self._tolerance = (TOLERANCE_DEVIATIONS * calibration.spread[-1, used]).clamp(min=LEAST_EFFECT)
        self.wealth = torch.zeros(2, len(used), dtype=torch.float64)  # log M of each side and statistic
        self.most = math.log(LEVEL * self.wealth.numel()) + _CAP
        self._since = torch.full_like(self.wealth, math.nan)
        self._clear()

    def _clear(self) -> None:
        self._rows = 0
        self._energies = torch.zeros(self.reference.dimension, dtype=torch.float64)
        self._sum = torch.zeros(self.reference.dimension, dtype=torch.float64)
        self._trace = self._frobenius = 0.0

    def add(self, start: float, rows: int, energies: Tensor, total: Tensor, trace: float, frobenius: float) -> None:
        """Add a block that began at `start`: its rows, energies (d,) and sum of rows (d,), and the products of traces
        and of covariances with the block before it. Short blocks wait until 256 rows are together."""
        self._rows += rows
        self._energies += energies
        self._sum += total
        self._trace += trace
        self._frobenius += frobenius
        if self._rows < BLOCK_ROWS:
            return
        reference = self.reference
        named = {}
        if self._frobenius > 0 and self._trace > 0:
            named["participation_ratio"] = math.log(self._trace / self._frobenius / reference.participation_ratio)
        statistics = columns(reference, self._energies / self._rows, self._sum / self._rows, self._rows, named)
        self.bet(statistics[self.columns], start)
        self._clear()

    def bet(self, statistics: Tensor, start: float) -> None:
        """Multiply each side's wealth by the e-value of a block's statistics (s,), see `evalues`."""
        fresh = self.wealth <= 0
        self._since = torch.where(fresh, start, self._since)
        self.wealth = self.wealth.clamp(min=0) + self.evalues(statistics)
        # What lies far beyond the level would only delay the all-clear.
        self.wealth.clamp_(max=self.most)

    def evalues(self, statistics: Tensor) -> Tensor:
        """(2, ..., s) logarithms of e-values of blocks' statistics (..., s), for too low and for too high.

        The mean over stakes t of exp(t u - t^2/2), u the standardised distance beyond the tolerance: for u sub-Gaussian
        with mean at most 0 and variance at most 1 its expectation is at most 1. NaN, unknown, bets nothing.
        """
        distance = statistics - self._centre
        u = (torch.stack((-distance, distance)) - self._tolerance) / self._spread
        stakes = torch.tensor(STAKES, dtype=torch.float64).view(-1, *[1] * u.ndim)
        logs = torch.logsumexp(stakes * u - stakes.square() / 2, 0) - math.log(len(STAKES))
        return logs.clamp(max=_CAP).nan_to_num(nan=0.0)

    @property
    def evidence(self) -> Evidence:
        """What there is now."""
        value = float(torch.logsumexp(self.wealth.flatten(), 0)) - math.log(self.wealth.numel())
        side, column = divmod(int(self.wealth.argmax()), len(self.names))
        since = float(self._since[side, column])
        return Evidence(value / math.log(10), f"{self.names[column]} {('low', 'high')[side]}", since)
