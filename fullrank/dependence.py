"""Distance correlation: whether answers follow their inputs, measured on pairs of rows.

Healthy encoders put images that look alike near each other. Where each answer is another request's, the rows are the
same rows and every statistic of theirs is what it was; only what they have to do with their inputs is lost.
"""

import math

import torch
from torch import Tensor

from fullrank.bounds import UNKNOWN, Interval

# Of fewer different inputs the bounds say little.
LEAST_INPUTS = 64
_NORMAL = 1.96  # two-sided 95 %


def distance_correlation(first: Tensor, second: Tensor) -> Interval:
    """Bias-corrected distance correlation of two descriptions of the same n things, with 95 % bounds, in [-1, 1].

    first, second: (n, n) distances, 0 on the diagonal. The mean is about 0 where the two are independent, whatever
    their laws, and the value 1 where all distances are the same up to a factor. A ratio of unbiased covariances,
    V = [S1 - 2 S2 / (n - 2) + S3 / ((n - 1)(n - 2))] / (n (n - 3)) with S1 = sum of a_ij b_ij, S2 = sum over i of
    a_i. b_i. and S3 = a.. b.. (Székely, Rizzo & Bakirov 2007; Székely & Rizzo 2013; as sums: Huo & Székely 2016). The
    bounds leave out one row at a time, not one pair: rows are the sample. NaN for n < 5, and where either does not
    vary. Cost: n^2.
    """
    n = len(first)
    if n < 5:
        return UNKNOWN
    both, one, other = (_covariances(a, b) for a, b in ((first, second), (first, first), (second, second)))
    variances = one * other
    if not bool(((one > 0) & (other > 0)).all()):
        return UNKNOWN
    values = both / variances.sqrt()
    estimate, left_out = float(values[0]), values[1:]
    half = _NORMAL * math.sqrt((n - 1) * float(left_out.var(correction=0)))
    return Interval(max(-1.0, estimate - half), estimate, min(1.0, estimate + half))


def input_correlation(squares: Tensor, inputs: Tensor, reach: float) -> Interval:
    """Distance correlation of rows and what was embedded, with 95 % bounds: about 0 where answers are those of other
    requests.

    squares: (n, n) squared distances between rows; inputs: the same between their inputs, NaN where one is not known;
    reach: the squared distance up to which two inputs count as one picture, which counts once. NaN where fewer than 64
    inputs differ. Lower on traffic of one kind than on mixed traffic, so compare with healthy traffic of the same
    encoder.
    """
    # An input without a descriptor has no known distance, not to itself either.
    fresh = inputs.diagonal().isfinite() & ~(inputs <= reach).tril(-1).any(1)
    if int(fresh.sum()) < LEAST_INPUTS:
        return UNKNOWN
    rows, shown = (it[fresh][:, fresh].double().clamp(min=0).sqrt().fill_diagonal_(0) for it in (squares, inputs))
    return distance_correlation(rows, shown)


def _covariances(a: Tensor, b: Tensor) -> Tensor:
    """(n + 1,) distance covariances, float64: of all n things, then with each of them left out."""
    n = len(a)
    products, a_sums, b_sums = (a * b).sum(1), a.sum(1), b.sum(1)
    first, second = products.sum(), a_sums @ b_sums
    a_total, b_total = a_sums.sum(), b_sums.sum()
    whole = _covariance(first, second, a_total * b_total, n)
    left_out = _covariance(
        first - 2 * products,
        second - a_sums * b_sums - b @ a_sums - a @ b_sums + products,
        (a_total - 2 * a_sums) * (b_total - 2 * b_sums),
        n - 1,
    )
    return torch.cat((whole[None], left_out))


def _covariance(first: Tensor, second: Tensor, third: Tensor, n: int) -> Tensor:
    return (first - 2 * second / (n - 2) + third / ((n - 1) * (n - 2))) / (n * (n - 3))
