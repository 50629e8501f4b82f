"""Measures of a bounded sample of recent rows: what moments of second order cannot say.

A window keeps at most 512 of its rows, drawn evenly over its time. Their pairs give neighbourhoods, their units counts.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from fullrank.bounds import UNKNOWN, Interval
from fullrank.dependence import input_correlation
from fullrank.gaussianity import random_slices, slice_statistic
from fullrank.neighbours import (
    LocalDimension,
    between,
    copies,
    hubness,
    local_dimension,
    shared_answers,
    squared_distances,
)
from fullrank.rows import unit

SAMPLE_ROWS = 512
# Rows that each of a window's groups keeps, at most: ten groups make a sample, joined ones keep their share.
GROUP_ROWS = 128
# Fewer say nothing: a hub among 100 rows is chance.
LEAST_ROWS = 256
SLICES = 64
# A unit whose deviation is below this share of the usual one gives nothing.
DEAD_SHARE = 1e-3
# A unit that is this near to an end of its range in so large a share of rows is stuck there.
STUCK_REACH = 1e-3
STUCK_SHARE = 0.95
_UNKNOWN = LocalDimension(math.nan, math.nan, math.nan)


@dataclass(frozen=True)
class SampleMeasures:
    """Measures of `rows` sampled rows; NaN and None where they are too few.

    dead_units: coordinates that hardly vary; saturated_units: those stuck at one end of their range, dead ones apart;
    hubness: see `neighbours.hubness`; local_dimension: see `neighbours.local_dimension`; gaussianity: Epps and Pulley's
    statistic over 64 random slices, see `gaussianity.slice_statistic`; copies_share: share of rows that have a copy in
    the sample; distinct_rows: how many different rows it holds; shared_answers: share of rows that equal the row of
    another input, see `neighbours.shared_answers`, NaN without inputs; input_correlation: whether rows follow their
    inputs, see `dependence.input_correlation`, NaN without inputs.
    """

    rows: int = 0
    dead_units: int | None = None
    saturated_units: int | None = None
    hubness: float = math.nan
    local_dimension: LocalDimension = field(default=_UNKNOWN)
    gaussianity: float = math.nan
    copies_share: float = math.nan
    distinct_rows: int = 0
    shared_answers: float = math.nan
    input_correlation: Interval = UNKNOWN

    def to_dict(self) -> dict[str, Any]:
        """By name; the local dimension and the inputs' correlation with their bounds."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        fields |= {"input_correlation": asdict(self.input_correlation)}
        return fields | {"local_dimension": self.local_dimension._asdict()}


def thinned(rows: Tensor, count: int) -> Tensor:
    """At most `count` of the rows (n, d), evenly spaced in their order."""
    n = len(rows)
    return rows if n <= count else rows[torch.linspace(0, n - 1, count, dtype=torch.float64).round().long()]


def joined(first: Tensor, rows: int, second: Tensor, others: int) -> Tensor:
    """The sample of two groups of `rows` and `others` rows from their samples: each by its share of the rows."""
    if len(first) + len(second) <= GROUP_ROWS:
        return torch.cat((first, second))
    count = round(GROUP_ROWS * rows / max(1, rows + others))
    return torch.cat((thinned(first, count), thinned(second, GROUP_ROWS - count)))


def alike(inputs: Sequence[Tensor | None], counts: Sequence[int]) -> list[Tensor] | None:
    """Descriptors (n, k) of several samples of so many rows, NaN where one has none; None where no sample has any,
    or their widths differ."""
    widths = {part.shape[1] for part in inputs if part is not None}
    if len(widths) != 1:
        return None
    width = widths.pop()
    return [torch.full((n, width), math.nan) if part is None else part for part, n in zip(inputs, counts, strict=True)]


def together(samples: Sequence[Tensor], counts: Sequence[int]) -> Tensor | None:
    """One sample of at most 512 rows, of groups that hold so many rows each; None without rows.

    Each group gives by its share of the rows, and so many that none runs short.
    """
    parts = [(sample, count) for sample, count in zip(samples, counts, strict=True) if len(sample)]
    if not parts:
        return None
    rate = min(SAMPLE_ROWS / sum(count for _, count in parts), *(len(sample) / count for sample, count in parts), 1.0)
    return torch.cat([thinned(sample, max(1, round(rate * count))) for sample, count in parts])[:SAMPLE_ROWS]


def stuck_units(rows: Tensor) -> tuple[int, int]:
    """(dead, saturated) coordinates of rows (n, d), as the encoder gave them.

    Dead: a standard deviation of at most 1e-3 of the root mean square one; all where nothing varies. Saturated: not
    dead, and within 1e-3 of its range from the same end in 95 % of the rows: a ReLU that is hardly ever open, a tanh
    that is hardly ever off its limit. Encoders whose units are sparse have many in health: compare with the reference.
    """
    x = rows.double()
    deviation = x.std(0, correction=0)
    dead = deviation <= DEAD_SHARE * deviation.square().mean().sqrt()
    low, high = x.amin(0), x.amax(0)
    reach = STUCK_REACH * (high - low)
    at_low = (x <= low + reach).double().mean(0)
    at_high = (x >= high - reach).double().mean(0)
    saturated = ~dead & (torch.maximum(at_low, at_high) >= STUCK_SHARE)
    return int(dead.sum()), int(saturated.sum())


def measure_sample(rows: Tensor | None, inputs: Tensor | None = None, reach: float = math.nan) -> SampleMeasures:
    """The measures of sampled rows (n, d), finite and not zero, as the encoder gave them. Cost: n^2 d.

    inputs (n, k): their descriptors, NaN where there are none; reach: the squared distance up to which two inputs
    count as one picture.
    """
    if rows is None or len(rows) == 0:
        return SampleMeasures()
    squares = squared_distances(rows)
    repeats = copies(squares)
    if len(rows) < LEAST_ROWS:
        return SampleMeasures(len(rows), copies_share=repeats.share, distinct_rows=repeats.distinct)
    dead, saturated = stuck_units(rows)
    slices = random_slices(rows.shape[1], SLICES, seed=0)
    apart = None if inputs is None else between(inputs.double())
    return SampleMeasures(
        len(rows),
        dead,
        saturated,
        hubness(squares),
        local_dimension(squares),
        slice_statistic(unit(rows.double()), slices),
        repeats.share,
        repeats.distinct,
        math.nan if apart is None else shared_answers(squares, apart, reach),
        UNKNOWN if apart is None else input_correlation(squares, apart, reach),
    )
