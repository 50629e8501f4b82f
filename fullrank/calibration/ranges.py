"""Calibration: the range of each statistic on healthy traffic. Thresholds lie outside it."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor
from torch.nn import functional as F

# Statistics after the bands' own: on the logarithm of their ratio to the reference, but for the last six.
NAMED = (
    "head",
    "participation_ratio",
    "effective_rank",
    "total_variance",
    "mean_shift",
    "numerical_rank",
    "input_distance",
    "tail_shift",
    "input_correlation",
    "texture_shift",
)
LOGARITHMIC = NAMED[:4]
# A threshold lies this many standard deviations of healthy windows out, and never nearer than this effect.
DEVIATIONS = 6.0
LEAST_EFFECT = 0.1
# Variances by which the mean moves along a typical tail direction. Gamma, JPEG of quality 8, 2 bits a pixel and swapped
# channels move it by 0.007 to 0.02.
LEAST_TAIL_SHIFT = 0.004
# What a statistic reaches on one kind of healthy input alone, widened by this, is still no fault of the model.
NARROW_MARGIN = 1.25
BLOCK_ROWS = 256
_PREFIX = "calibration."
_TABLES = ("centre", "spread", "low", "high")


@dataclass(frozen=True)
class Range:
    """The range of a statistic, as a ratio or in its own unit: `low` to `high` on healthy traffic; `narrow_low` to
    `narrow_high` reached by healthy inputs of one kind only. NaN where unknown."""

    low: float = math.nan
    high: float = math.nan
    narrow_low: float = math.nan
    narrow_high: float = math.nan


@dataclass(frozen=True, eq=False)
class Calibration:
    """Healthy statistics at several numbers of rows: rows (g,) rising, the first a block's; the others (g, s) float64.

    Columns: one a band of the reference, then `NAMED`. centre and spread: mean and standard deviation over healthy
    traffic (independent, in sessions, drifting), with the reference's own sampling error in the spread; low and high:
    the extremes over traffic of one kind only. NaN where the rows do not determine a statistic.
    """

    rows: tuple[int, ...]
    centre: Tensor
    spread: Tensor
    low: Tensor
    high: Tensor

    def range(self, name: str, rows: int) -> Range:
        """The range of one of `NAMED` or of a band by its index ("0", "1", ...), for a window of that many rows.

        Between the numbers of rows measured, linear in the logarithm of n; below the least, the spread grows as
        n^-1/2.
        """
        bands = self.centre.shape[1] - len(NAMED)
        column = bands + NAMED.index(name) if name in NAMED else int(name)
        at = [math.log(n) for n in self.rows[1:]]
        x = math.log(max(rows, 2))
        upper = min(max(sum(a <= x for a in at), 1), len(at) - 1) if len(at) > 1 else 0
        lower = max(upper - 1, 0)
        share = 0.0 if lower == upper else min(1.0, max(0.0, (x - at[lower]) / (at[upper] - at[lower])))

        def value(table: Tensor) -> float:
            return float((1 - share) * table[1 + lower, column] + share * table[1 + upper, column])

        least = LEAST_TAIL_SHIFT if name == "tail_shift" else LEAST_EFFECT
        reach = max(DEVIATIONS * value(self.spread) * max(1.0, math.exp((at[0] - x) / 2)), least)
        centre, low, high = value(self.centre), value(self.low), value(self.high)
        values = (centre - reach, centre + reach, low, high)
        logarithmic = name in LOGARITHMIC or name not in NAMED
        return Range(*(math.exp(v) if logarithmic else v for v in values))

    def tensors(self) -> dict[str, Tensor]:
        """Contiguous tensors for safetensors, named "calibration.rows", ..."""
        tables = {_PREFIX + name: getattr(self, name).contiguous() for name in _TABLES}
        return tables | {_PREFIX + "rows": torch.tensor(self.rows, dtype=torch.int64)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], bands: int) -> Self | None:
        """The inverse of `tensors`; None where there are none. ValueError that names what is missing or misshapen."""
        found = {n.removeprefix(_PREFIX): t for n, t in tensors.items() if n.startswith(_PREFIX)}
        if not found:
            return None
        rows = tuple(found.get("rows", torch.zeros(0)).flatten().long().tolist())
        if len(rows) < 2 or list(rows) != sorted(set(rows)) or rows[0] < 2:
            raise ValueError(f"reference: calibration.rows must be two or more rising numbers, got {rows}")
        # Older files end before: without textures, then without how answers follow inputs, without the tail's shift.
        shapes = [(len(rows), bands + len(NAMED) - older) for older in range(4)]
        for name in _TABLES:
            if name not in found or tuple(found[name].shape) not in shapes or found[name].isinf().any():
                raise ValueError(f"reference: calibration.{name} is missing, infinite or not of shape {shapes[0]}")
        tables = [found[name].to("cpu", torch.float64) for name in _TABLES]
        return cls(rows, *(F.pad(table, (0, shapes[0][1] - table.shape[1]), value=math.nan) for table in tables))
