"""Measures rows exactly as the service's monitor does, one chunk at a time, and bounds every figure.

The rows pass through the monitor's own blocks and its snapshot. So a new statistic of the library appears in a report
by itself, and the verdict is the one that the service would give.
"""

import inspect
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fullrank import measures
from fullrank.bounds import Interval, jackknife
from fullrank.calibration.ranges import BLOCK_ROWS
from fullrank.calibration.sequential import Evidence
from fullrank.monitor.blocks import Batch, BlockMaker
from fullrank.monitor.snapshot import GROUPS, Counters, Snapshot, SnapshotMaker
from fullrank.reference import Reference
from fullrank.statistics import WindowStatistics, measure

Function = Callable[[Tensor], Any]


class Tally:
    """Takes `rows` rows in, as a monitor would in as many seconds, and keeps ten groups of moments.

    Memory: about 15 d^2 x 8 bytes, whatever the number of rows. The sequential test is off: rows of a file are in no
    order of time.
    """

    def __init__(self, dimension: int, reference: Reference | None, rows: int) -> None:
        bands = () if reference is None else reference.bands
        self.counters = Counters(band_energy=dict.fromkeys(bands, 0.0))
        self._dimension = dimension
        self._reference = reference
        self._seen = 0
        # A row a second: blocks close after a tenth of the window, so that even few rows lie in ten groups.
        self._windows = (float(max(rows, GROUPS)),)
        self._blocks = BlockMaker(
            dimension, reference, self._windows, BLOCK_ROWS, lambda: float(self._seen), self.counters.add
        )
        self._blocks.detector = None
        self._step = max(1, min(BLOCK_ROWS, rows // GROUPS))

    def add(self, rows: Tensor, inputs: Tensor | None = None) -> None:
        """Add rows (n, d), normalised or not, and the descriptors (n, k) of what they are rows of."""
        for start in range(0, len(rows), self._step):
            part = slice(start, start + self._step)
            batch = Batch(float(self._seen), rows[part], None, None if inputs is None else inputs[part], None)
            self._seen += len(batch.rows)
            self._blocks.take([batch], everything=False)

    def snapshot(self, canary: Tensor | None = None) -> Snapshot:
        """Statistics and verdict of all rows. canary (m, d): what the reference's canary images embed to now."""
        self._blocks.take([], everything=True)
        clock: Callable[[], float] = lambda: self._windows[0]  # noqa: E731
        maker = SnapshotMaker(self._dimension, self._reference, self._windows, clock)
        if canary is not None:
            maker.record_canary(canary)
        return maker.refresh(self._blocks.ring, Evidence(), self.counters, everything=True)

    def bounded(self, window: WindowStatistics) -> dict[str, Interval]:
        """Every measure of the rows with its 95 % bounds, by leaving out one group of rows at a time."""
        groups = [it for it in self._blocks.ring.blocks if it.moments.count]
        weights = torch.tensor([float(it.moments.count) for it in groups], dtype=torch.float64)
        without = [
            measure(math.nan, [*groups[:i], *groups[i + 1 :]], self._reference, self._dimension)
            for i in range(len(groups))
        ]
        left = [figures(it) for it in without]
        found = {}
        for name, value in figures(window).items():
            found[name] = bounds(value, [it.get(name, math.nan) for it in left], weights)
        return found


def figures(window: WindowStatistics) -> dict[str, float]:
    """Each statistic of a window that is one number, and each measure of its spectrum that the library has."""
    found = {}
    for name, value in vars(window).items():
        if isinstance(value, Interval):
            found[name] = value.estimate
        elif isinstance(value, int | float) and name not in ("seconds", "rows", "groups", "zeros"):
            found[name] = float(value)
    found["zero_share"] = window.zero_share
    for name, of in functions("eigenvalues").items():
        if name not in found and len(window.eigenvalues):
            found[name] = number(of(window.eigenvalues))
    return found


def sampled(rows: Tensor, known: Iterable[str]) -> dict[str, Interval]:
    """Each measure of rows (n, d) that the library has and `known` lacks, with bounds; measured on these rows."""
    parts = torch.chunk(rows, GROUPS)
    weights = torch.tensor([float(len(it)) for it in parts], dtype=torch.float64)
    found = {}
    for name, of in functions("rows").items():
        if name in known or math.isnan(value := number(of(rows))):
            continue
        left = [number(of(torch.cat([*parts[:i], *parts[i + 1 :]]))) for i in range(len(parts))]
        found[name] = bounds(value, left, weights)
    return found


def functions(argument: str) -> dict[str, Function]:
    """The public measures that need only `argument`: "eigenvalues" or "rows"."""
    found = {}
    for name in measures.__all__:
        of = getattr(measures, name)
        if inspect.isclass(of):
            continue
        first, *others = inspect.signature(of).parameters.values()
        if first.name == argument and all(it.default is not inspect.Parameter.empty for it in others):
            found[name] = of
    return found


def number(value: Any) -> float:
    """The number that a measure gave: itself, or the first of several; NaN if it gave none."""
    if isinstance(value, tuple):
        value = value[0]
    return float(value) if isinstance(value, int | float) else math.nan


def bounds(value: float, left: list[float], weights: Tensor) -> Interval:
    """A value with its bounds by the jackknife; NaN for bounds that the groups do not determine."""
    if not all(math.isfinite(it) for it in (value, *left)) or len(left) < 3:
        return Interval(math.nan, value, math.nan)
    if min(value, *left) <= 0:
        half = jackknife(value, left, weights)
        return Interval(value - half, value, value + half)
    # On the logarithm, where the law is near normal and the lower bound stays positive.
    half = jackknife(math.log(value), [math.log(it) for it in left], weights)
    return Interval(value * math.exp(-half), value, value * math.exp(half))


def choose(count: int, size: int, seed: int = 0) -> Tensor:
    """`size` of `count` positions, or all of them: a uniform sample without replacement, rising."""
    if count <= size:
        return torch.arange(count)
    found = np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False)
    return torch.from_numpy(np.sort(found))
