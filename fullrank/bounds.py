"""Bounds of what a window's rows say: by leaving groups out, by counting copies, and by what no row has shown yet."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fullrank.moments import Pool, Traces

NAN = math.nan
# Student's t at 97.5 %, for 1, 2, ... degrees of freedom.
_T: tuple[float, ...] = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_T += (2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)
MINIMUM_GROUPS = 3
# What happens with this probability over n is absent from n independent rows in 5 % of samples: the rule of three.
UNSEEN = 3.0


@dataclass(frozen=True)
class Interval:
    """An estimate and its two-sided 95 % bounds; NaN where unknown."""

    lower: float = NAN
    estimate: float = NAN
    upper: float = NAN


UNKNOWN = Interval()


class LeftOut(NamedTuple):
    """What leaving out groups says of an estimate: half-width of its 95 % interval, and how much it reads too high."""

    half: float
    bias: float


def leave_out(estimate: float, left_out: Sequence[float], weights: Tensor) -> LeftOut:
    """Half-width and bias of an estimate, from its values with one group of rows left out at a time.

    Groups may differ in size: the delete-m_j jackknife (Busing, Meijer & van der Leeden 1999). NaN below 3 groups.
    """
    g = len(left_out)
    if g < MINIMUM_GROUPS:
        return LeftOut(NAN, NAN)
    values = torch.tensor(left_out, dtype=torch.float64)
    h = weights.sum() / weights
    pseudo = h * estimate - (h - 1) * values
    centre = g * estimate - float(((1 - 1 / h) * values).sum())
    variance = float(((pseudo - centre).square() / (h - 1)).mean())
    return LeftOut(_T[min(g - 1, len(_T)) - 1] * math.sqrt(variance), estimate - centre)


def jackknife(estimate: float, left_out: Sequence[float], weights: Tensor) -> float:
    """Half-width of the 95 % interval of an estimate: see `leave_out`."""
    return leave_out(estimate, left_out, weights).half


def independent_rows(traces: Traces, copies: Tensor) -> float:
    """How many of n rows are no copies of each other, as far as the variance goes: in [1, n].

    The design effect of Kish 1965, section 8.2, with weights |y|^2: n / (1 + s e), s the share of pairs, by weight,
    that are copies, e the rows that carry the variance. copies (4,): `profile.copies` summed over blocks. Pairs of
    distant blocks are not compared: they are taken to hold as many copies as neighbouring blocks do.
    """
    within, pairs_within, across, pairs_across = copies.tolist()
    share = within / pairs_within if pairs_within else 0.0
    if pairs_across:
        weight = traces.trace * (traces.count - 1)
        pairs = (weight**2 - traces.fourth * (traces.count - 1)) / 2
        near = min(1.0, pairs_within / pairs) if pairs > 0 else 1.0
        share = near * share + (1 - near) * across / pairs_across
    return traces.count / (1 + share * traces.effective_rows)


def lasting(apart: Tensor) -> float:
    """How much the variance of a mean over groups grows because neighbours are alike, 1 where they are not.

    apart (g, d): means of consecutive groups less that of all. (1 + r) / (1 - r) of a first-order autoregression, r
    the autocorrelation at lag 1 without the -1 / g that g independent groups have (Kendall 1954), at most 1 / 2.
    """
    square = float(apart.square().sum())
    g = len(apart)
    if not square > 0:
        return 1.0
    lag = float((apart[1:] * apart[:-1]).sum()) / (g - 1) * g / square
    r = min(0.5, max(0.0, lag + 1 / g))
    return (1 + r) / (1 - r)


def participation_ratio(pooled: Pool, weights: Tensor, copies: Tensor) -> Interval:
    """The participation ratio of n unit rows (d,) with bounds, all in [1, d]; NaN where `Traces` gives NaN.

    Three doubts are added up. *Sampling*: a delete-one-group jackknife of theta = tr C^2 / (tr C)^2 gives a
    half-width r and a bias b, both relative to theta. The bounds are PR exp(-r) and PR / (1 - r), d from r = 1 on.
    Where rows come in sessions, pairs of one session raise theta and leaving out a group shows it: b > 0 is taken
    off 1 - r, b < 0 added to -r. Both grow where neighbouring groups are alike (`lasting`). *Copies*: if only m of
    the rows are no copies (`independent_rows`), r grows by sqrt(n / m), and the upper bound is that of the ratio
    computed as if there were m rows (`Traces.among`), because a pair of copies adds |y|^4 to tr C^2. *The unseen*:
    m rows say nothing of what has a probability of q = 3 / m or less (Hanley & Lippman-Hand 1983). Its variance is
    u = q a at most, a = (1 + |mean|)^2 on the unit sphere. In one direction, a usual one, it takes the ratio down
    to (t + u)^2 / (T + 2 u T / t + u^2), in all directions up to (t + u)^2 / T, with t = tr C and T = tr C^2. No
    bounds below 3 groups of rows.
    """
    traces, d = pooled.traces, len(pooled.mean)
    estimate = traces.participation_ratio
    if not estimate > 0 or len(weights) < MINIMUM_GROUPS:
        return Interval(estimate if estimate == 0 else NAN, estimate, estimate if estimate == 0 else NAN)
    theta = traces.square_trace / traces.trace_squared
    left_out = [it.square_trace / it.trace_squared if it.trace_squared > 0 else NAN for it in pooled.without]
    rows = independent_rows(traces, copies)
    half, bias = leave_out(theta, left_out, weights)
    inflated = lasting(pooled.apart)
    apart, high = half / theta * math.sqrt(traces.count / rows * inflated), bias / theta * inflated
    if math.isnan(apart):
        return Interval(NAN, estimate, NAN)
    unlike = traces.among(rows)
    known = unlike.square_trace > 0 and unlike.trace_squared > 0
    most = max(estimate, unlike.trace_squared / unlike.square_trace) if known else math.inf
    least = 1 - max(0.0, high) - apart
    upper = most / least if least > 0 else math.inf
    t, square = math.sqrt(traces.trace_squared), traces.square_trace
    unseen = min(1.0, UNSEEN / rows) * (1 + float(torch.linalg.vector_norm(pooled.mean))) ** 2
    raised = (1 + unseen / t) ** 2
    lowered = raised / (1 + 2 * unseen / t + unseen**2 / square)
    lower = estimate * math.exp(-apart + min(0.0, high)) * lowered
    return Interval(min(max(1.0, lower), estimate), estimate, max(estimate, min(float(d), upper * raised)))


def ratio(sums: Tensor, weights: Tensor, reference: float) -> Interval:
    """sums (g,) of row-weighted energies over weights (g,) of rows, against the reference."""
    estimate = float(sums.sum() / weights.sum()) / reference
    rest = (sums.sum() - sums) / (weights.sum() - weights) / reference
    half = jackknife(estimate, rest.tolist(), weights)
    return Interval(max(0.0, estimate - half) if half == half else NAN, estimate, estimate + half)
