"""Measures of collapse: pure functions of a spectrum, or of rows, in float64.

eigenvalues: those of a covariance, (d,), in any order, in squared units of the rows. singular_values: those of a matrix
of rows, (min(n, d),). rows: (n, d) of any float dtype. A spectrum of zeros has rank 0; one that holds NaN or infinity
reads NaN (0 where the answer is a whole number). All raise ValueError for an input of the wrong shape. No single number
here sees everything: ranks are blind to scale, variance is blind to rank.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fullrank.rows import ArrayLike, as_rows, as_tensor, unit

__all__ = [
    "PowerLaw",
    "alpha_req",
    "condition_number",
    "effective_rank",
    "entropy_correction",
    "log_spectrum",
    "mean_cosine",
    "minimum_rows",
    "noise_floor",
    "numerical_rank",
    "participation_ratio",
    "rankme",
    "spectrum",
    "stable_rank",
    "std_ratio",
    "variance_dimensions",
    "wasserstein_uniformity",
]


MINIMUM_ROWS_ENTROPY = 64
LARGEST_CORRECTION = 0.15
# TF32 is no torch dtype: float32 tensors, whose entries are cut to 10 bits of mantissa where they are multiplied.
TF32_EPSILON = 2.0**-10
# An eigenvalue below this share of the mean one is rounding.
_NOTHING = 1e-10


class PowerLaw(NamedTuple):
    """A line fitted to log eigenvalue against log rank: exponent, goodness (weighted R^2), and the ranks it lies on."""

    exponent: float
    r_squared: float
    first: int
    last: int


def spectrum(covariance: Tensor, uplo: str = "L") -> Tensor:
    """Eigenvalues (d,) of a finite covariance (d, d), falling, none below 0.

    Of the covariance only the triangle that `uplo` names, "L" or "U", is read. Rounding leaves empty directions
    slightly negative, which is cut off here. RuntimeError where an entry read is not finite.
    """
    eigenvalues: Tensor = torch.linalg.eigvalsh(covariance, UPLO=uplo)
    return eigenvalues.flip(0).clamp(min=0)


def effective_rank(eigenvalues: ArrayLike) -> float:
    """exp(H(p)) with p = lambda / sum(lambda), in [1, d]; 0 for no variance.

    The plug-in value, which reads low when rows are few (60 % of d at n = d for an isotropic law): see
    `entropy_correction` and `Moments.effective_rank`. Blind to scale and to which directions live; it halves both when
    half of the tail dies and when one direction grows five-fold. Roy & Vetterli 2007, applied to
    covariance eigenvalues: on singular values the same spectrum reads far higher, which is `rankme`.
    """
    p = _shares(_spectrum(eigenvalues))
    return 0.0 if p is None else math.exp(float(torch.special.entr(p).sum()))


def rankme(singular_values: ArrayLike, epsilon: float = 1e-7) -> float:
    """exp(H(p)) with p = sigma / ||sigma||_1 + epsilon, in [1, about d]; 0 for no variance.

    As published, epsilon is added without renormalising, so that a large one can push the value above d. Shares are of
    sigma and not sigma^2: it hardly notices one dominating direction. Blind to scale; of rows that are not centred, as
    published, it reads a shift of the mean as collapse. Garrido et al. 2023 (RankMe).
    """
    p = _shares(_spectrum(singular_values))
    if p is None:
        return 0.0
    p = p + epsilon
    return math.exp(float(torch.special.entr(p).sum()))


def participation_ratio(eigenvalues: ArrayLike) -> float:
    """(sum lambda)^2 / sum lambda^2, the Renyi-2 rank, in [1, d]; 0 for no variance.

    Cannot see scale, nor a tail of little variance dying: the leading directions rule it. For rows rather than a known
    spectrum use `Moments.participation_ratio`, which is not biased by n. Gao et al. 2017.
    """
    p = _shares(_spectrum(eigenvalues))
    return 0.0 if p is None else 1.0 / float(p.square().sum())


def stable_rank(eigenvalues: ArrayLike) -> float:
    """sum(lambda) / max(lambda) = ||A||_F^2 / ||A||_2^2 of the rows, in [1, d]; 0 for no variance.

    Sees the leading direction against all others and nothing else. Rudelson & Vershynin 2007, section 1; NESum of He &
    Ozay 2022.
    """
    p = _shares(_spectrum(eigenvalues))
    return 0.0 if p is None else 1.0 / float(p.max())


def numerical_rank(eigenvalues: ArrayLike, floor: float = 0.0) -> int:
    """How many eigenvalues stand above `floor` (squared units) and above what summing in float32 leaves, in [0, d].

    `floor` is the variance per dimension that rounding in the serving dtype invents: `noise_floor`. Without it an
    encoder collapsed to k directions and served in bfloat16 reads as full rank. Cannot see a spectrum that merely
    decays. The float32 limit is eps times the mean eigenvalue; the usual sigma > d eps sigma_1, the default of
    `numpy.linalg.matrix_rank`, would call the tail of a long spectrum empty.
    """
    values = _spectrum(eigenvalues)
    if not torch.isfinite(values).all():
        return 0
    arithmetic = torch.finfo(torch.float32).eps * float(values.mean()) if len(values) else 0.0
    return int((values > max(floor, arithmetic)).sum())


def noise_floor(dtype: torch.dtype | str, dimension: int, mean_square: float = 1.0) -> float:
    """Variance per dimension that computing in `dtype` may add to rows whose mean squared norm is `mean_square`, > 0.

    dtype: a torch dtype, its name, or "tf32". Rounding an entry once to a dtype of spacing eps adds a relative variance
    of about 0.045 eps^2 (uniform within an interval whose relative width falls from eps to eps/2 over a binade); the
    layers before add more, for a ResNet-18 0.1 to 0.7 eps^2 in all (`benchmarks.precision`), whence the floor of
    eps^2. Cannot see noise that an encoder amplifies, such as a last layer that cancels nearly all of its input.
    Unit-norm rows have mean_square 1. ValueError for a name that is neither.
    """
    if dimension < 1:
        raise ValueError(f"dimension: expected at least 1, got {dimension}")
    return _epsilon(dtype) ** 2 * mean_square / dimension


def alpha_req(eigenvalues: ArrayLike, first: int = 4, last: int = 100) -> PowerLaw:
    """Exponent alpha of lambda_i ~ i^-alpha on the positive eigenvalues of ranks `first` to `last` (1-based, both in).

    In (-0, inf): 0 for an isotropic law, about 1 for a well-spread representation, large for a collapsed one; not
    monotone in quality, and blind to what lies outside the range. NaN where fewer than three positive eigenvalues lie
    in it. Agrawal et al. 2022 (alpha-ReQ), section 3, whose text gives no range; range and weights, least squares with
    weight 1/i, are those of the code released with it.
    """
    if first < 1:
        raise ValueError(f"first: expected a rank from 1 on, got {first}")
    values = _spectrum(eigenvalues).sort(descending=True).values
    last = max(0, min(last, int((values > 0).sum())))
    y = values[first - 1 : last]
    if len(y) < 3 or not bool(values.isfinite().all()):
        return PowerLaw(math.nan, math.nan, first, last)
    ranks = torch.arange(first, last + 1, dtype=torch.float64)
    weights = 1 / ranks
    x, y = (v - (weights @ v) / weights.sum() for v in (ranks.log(), y.log()))
    slope = float((weights * x) @ y / ((weights * x) @ x))
    total = float((weights * y) @ y)
    goodness = 1.0 - float(weights @ (y - slope * x).square()) / total if total > 0 else 1.0
    return PowerLaw(-slope, goodness, first, last)


def variance_dimensions(eigenvalues: ArrayLike, share: float = 0.99) -> int:
    """The least number of principal directions that hold `share` (in (0, 1]) of the variance, in [1, d]; 0 for none.

    Sees the strong directions only: at share 0.5 mostly the first few, and none of what the rest does. The cumulative
    percentage rule of principal components (Jolliffe 2002, section 6.1.1). ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share: expected a value in (0, 1], got {share}")
    p = _shares(_spectrum(eigenvalues))
    if p is None or bool(p.isnan().any()):
        return 0
    cumulative = p.sort(descending=True).values.cumsum(0)
    return int((cumulative < share - 1e-12).sum()) + 1


def condition_number(eigenvalues: ArrayLike) -> float:
    """Largest over smallest eigenvalue of the covariance, in [1, inf]: inf when a direction is empty, NaN when all are.

    Sees the two ends and nothing between: one dead direction among thousands makes it infinite, and from n <= d rows
    it always is. The square of the rows' own condition number (Golub & Van Loan 2013, section 2.6.2).
    """
    values = _spectrum(eigenvalues)
    if len(values) == 0 or not bool(values.isfinite().all()):
        return math.nan
    largest, smallest = float(values.max()), float(values.min())
    return math.nan if largest == 0 else largest / smallest if smallest > 0 else math.inf


def mean_cosine(rows: ArrayLike) -> float:
    """Mean cosine over all pairs of distinct rows, (||sum z||^2 - n) / (n (n - 1)), in [-1/(n-1), 1]; NaN below 2 rows.

    1 is complete collapse, 0 a centred law. Cannot see rank: a shared mean raises it while every direction is alive,
    and a centred law on a plane reads 0. rows: (n, d), any scale; rows of zeros count as orthogonal to all. The
    anisotropy of Ethayarajh 2019, over all pairs instead of a sample.
    """
    z = unit(as_rows(rows, dtype=torch.float64))
    n = len(z)
    return float(z.sum(0).square().sum() - z.square().sum()) / (n * (n - 1)) if n > 1 else math.nan


def std_ratio(rows: ArrayLike) -> float:
    """Mean over dimensions of the standard deviation of L2-normalised rows, times sqrt(d): 1 healthy, 0 collapsed.

    In [0, 1] up to 1/n. Sees complete collapse only: perfectly correlated dimensions keep their deviation. rows: (n,
    d); NaN below 2 rows. SimSiam (Chen & He 2021), section 4.1.
    """
    z = unit(as_rows(rows, dtype=torch.float64))
    return float(z.std(0).mean()) * math.sqrt(z.shape[1]) if len(z) > 1 else math.nan


def log_spectrum(rows: ArrayLike) -> Tensor:
    """log of the covariance's singular values of L2-normalised, centred rows (n, d): (d,), falling, in [-inf, 0].

    The curve in which dimensional collapse was first shown: it falls off a cliff at the surviving rank. Empty
    directions lie near log of the rounding error or at -inf. Cannot tell the sample's own cliff, at n - 1 from n <= d
    rows, from the encoder's. Jing et al. 2022 (DirectCLR), figure 2. ValueError below 2 rows.
    """
    z = unit(as_rows(rows, dtype=torch.float64))
    if len(z) < 2:
        raise ValueError("rows: expected at least 2")
    covariance = z.T.cov().reshape(z.shape[1], -1)
    if not bool(covariance.isfinite().all()):
        return torch.full((z.shape[1],), math.nan, dtype=torch.float64)
    spectrum: Tensor = torch.linalg.svdvals(covariance)
    return spectrum.log()


def entropy_correction(eigenvalues: ArrayLike, rows: float, kurtosis: float = 1.0) -> float:
    """What to add to the plug-in entropy H(p) so that its bias of order 1/rows is gone; multiply the rank by its exp.

    Write H = ln T - sum(lambda ln lambda) / T. Sample eigenvalues of n rows have the mean
    lambda_i (1 + (1/n) sum_j lambda_j / (lambda_i - lambda_j)) and the variance 2 lambda_i^2 / n (Lawley 1956). The
    gradient -(ln p_i + H) / T on the first and the Hessian on the second give E[H'] - H = -B / n with
    B = sum_{i<j} p_i p_j (ln p_i - ln p_j) / (p_i - p_j) + 1 - sum p_i^2 (1 + 2H + 2 ln p_i).

    Rows of an elliptical law multiply both moments by kurtosis = E[y_i^2 y_j^2] / (lambda_i lambda_j) and add a
    common scale to all eigenvalues, to which H is blind: the whole of B scales by it. 1 for Gaussian rows, (v - 2) /
    (v - 4) for Student's t. `rows` are the degrees of freedom, n - 1 where the mean was estimated. Evaluated at
    sample eigenvalues it falls short when rows < 2d: `Moments.effective_rank` says where it may be believed.
    """
    _check_rows(rows)
    p = _shares(_spectrum(eigenvalues))
    if p is None:
        return 0.0
    if bool(p.isnan().any()):
        return math.nan
    p = p[p > 0]
    if len(p) < 2:
        return 0.0
    log = p.log()
    entropy = -float(p @ log)
    pairs = 0.0
    panel = 64  # rows that stay in the cache: twice as fast at d = 2048
    for start in range(0, len(p), panel):
        part, rest = slice(start, start + panel), slice(start, None)
        b = p[rest]
        step = log[part, None] - log[rest]
        # (ln a - ln b) / (a - b) is 1 / a at a = b; near it the quotient of differences loses every digit.
        quotient = torch.where(step.abs() < 2e-9, 1 / b, step / (p[part, None] - b))
        # Symmetric: right of the diagonal block an entry stands for two.
        pairs += float(p[part] @ (2 * (quotient @ b) - quotient[:, :panel] @ p[part]))
    pairs = (pairs - float(p.sum())) / 2
    squares = float((p.square() * (1 + 2 * entropy + 2 * log)).sum())
    return kurtosis * (pairs + 1 - squares) / rows


def wasserstein_uniformity(eigenvalues: ArrayLike, mean_square: float = 0.0, rows: float = math.inf) -> float:
    """Wasserstein distance of N(mu, C) from the isotropic N(0, I/d): 0 for spread evenly, sqrt(2) for unit rows at one
    point; in [0, sqrt(2)] for unit rows.

    eigenvalues: those of C, (d,); mean_square: |mu|^2. Between Gaussian laws W^2 = |mu - mu'|^2 +
    tr(C + C' - 2 (C'^1/2 C C'^1/2)^1/2) (Givens & Shortt 1984, proposition 7), which for mu' = 0, C' = I/d is
    |mu|^2 + tr C + 1 - (2 / sqrt(d)) tr C^1/2. One number that sees a shift of the mean, lost directions and a lost
    scale together, so that it cannot say which. The uniformity of Fang et al. 2024 (arXiv 2403.00642).

    rows: the degrees of freedom of a sample's eigenvalues, whose tr C^1/2 reads low. With Lawley's expansion, as in
    `entropy_correction`, its bias is -(1/4n) (sum_ij s_i s_j / (s_i + s_j) + sum_i s_i / 2), s the square roots; it is
    taken off for n = rows, and the answer is NaN where it exceeds 15 % of the trace, where the rows do not span the
    directions, or where the eigenvalues are not finite.
    """
    _check_rows(rows)
    values = _spectrum(eigenvalues)
    d = len(values)
    if d == 0 or not bool(values.isfinite().all()) or not math.isfinite(mean_square):
        return math.nan
    roots = values.sqrt()
    trace = float(roots.sum())
    s = roots[roots > 0]
    pairs = 0.0
    for part in torch.split(s, 64):
        pairs += float((part[:, None] * s / (part[:, None] + s)).sum())
    missing = (pairs + float(s.sum()) / 2) / (4 * rows)
    if missing > LARGEST_CORRECTION * trace or rows <= int((values > _NOTHING * values.mean()).sum()):
        return math.nan
    square = mean_square + float(values.sum()) + 1 - 2 / math.sqrt(d) * (trace + missing)
    return math.sqrt(max(0.0, square))


def minimum_rows(eigenvalues: ArrayLike, kurtosis: float = 1.0) -> int:
    """The least n from which `Moments.effective_rank` speaks, for a law of these eigenvalues (d,); at least 64.

    Where the first-order correction falls to 15 %: 3.6 d for an isotropic law, far fewer for a spectrum that decays.
    About, because the gate itself is evaluated at the sample's eigenvalues. ValueError where they are not finite.
    """
    bias = entropy_correction(eigenvalues, 1.0, kurtosis)
    if not math.isfinite(bias):
        raise ValueError("eigenvalues: expected finite values")
    return max(MINIMUM_ROWS_ENTROPY, 1 + math.ceil(bias / math.log1p(LARGEST_CORRECTION)))


def _spectrum(values: ArrayLike) -> Tensor:
    # By numpy, which reads a list in float64; torch would in float32.
    given = as_tensor(np.asarray(values) if isinstance(values, list | tuple) else values, "spectrum").detach()
    if given.ndim != 1:
        raise ValueError(f"spectrum: expected one dimension, got shape {tuple(given.shape)}")
    if given.is_complex():
        raise ValueError("spectrum: expected real values, got complex ones")
    spectrum = given.to("cpu", torch.float64)
    return spectrum.clamp(min=0)  # a solver leaves zero eigenvalues slightly negative


def _check_rows(rows: float) -> None:
    if not rows > 0:
        raise ValueError(f"rows: expected degrees of freedom above 0, got {rows}")


def _shares(values: Tensor) -> Tensor | None:
    """values / sum, or None where there is no variance."""
    largest = float(values.max()) if len(values) else 0.0
    if largest == 0:
        return None
    scaled = values / largest  # so that neither 1e-300 nor 1e300 leaves the range of float64
    return scaled / scaled.sum()


def _epsilon(dtype: torch.dtype | str) -> float:
    if dtype == "tf32":
        return TF32_EPSILON
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype: expected a torch floating dtype or 'tf32', got {dtype!r}")
    return torch.finfo(found).eps
