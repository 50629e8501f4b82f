"""Additive moments of rows, and what can be read from them without bias."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fullrank import measures
from fullrank.measures import LARGEST_CORRECTION, MINIMUM_ROWS_ENTROPY, effective_rank, entropy_correction
from fullrank.rows import ArrayLike, as_rows, as_tensor
from fullrank.stored import check_plain

MINIMUM_ROWS_PARTICIPATION = 32
# Rows that carry the variance: fewer, and the estimate is theirs and not their law's.
MINIMUM_EFFECTIVE_ROWS = 16.0
# Rows of a matrix worked on at a time where many are compared: at d = 2048 a megabyte, which stays in the cache.
_PANEL = 64
# Scales what is squared, or multiplied from both sides, to half.
_HALF = math.sqrt(0.5)
# Variance below this share of the mean square about the shift is what float64 sums leave of constant rows.
_ROUNDING = 1e-14


class Moments:
    """Count, sum, scatter and sums of |y|^2 y and |y|^4 of rows y about a fixed shift: float64, additive, order-free.

    `shift` (d,) is where differences are taken; None takes the mean of the first rows added. It changes no result,
    only the rounding: around a shift within the cloud, a mean 10^6 times the spread is harmless. Products are taken in
    float64, at twice the price of float32: summed in float32, an empty direction reads 10^-7 of the largest eigenvalue,
    and a law of one direction dozens. Rows that hold NaN or infinity are counted in `nonfinite` and left out.
    ValueError for a dimension below 1 or a shift of another width.
    """

    def __init__(self, dimension: int, shift: ArrayLike | None = None) -> None:
        if dimension < 1:
            raise ValueError(f"dimension: expected at least 1, got {dimension}")
        self.dimension = dimension
        self.shift: Tensor | None = None
        if shift is not None:
            self.shift = as_tensor(shift, "shift").detach().to("cpu", torch.float64).clone()
            if self.shift.shape != (dimension,):
                raise ValueError(f"shift: expected shape ({dimension},), got {tuple(self.shift.shape)}")
        self.count = 0
        self.nonfinite = 0
        self.sum = torch.zeros(dimension, dtype=torch.float64)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64)
        self.cubic = torch.zeros(dimension, dtype=torch.float64)  # sum of |y|^2 y
        self.quartic = 0.0  # sum of |y|^4

    def add(self, rows: ArrayLike) -> Self:
        """Add (n, d) rows of any float dtype on any device. ValueError names what is wrong with the rows."""
        x = as_rows(rows, self.dimension)
        # A float32 row whose squared norm overflows would poison the sums as surely as an infinity.
        finite = x.square().sum(1).isfinite()
        self.nonfinite += len(x) - int(finite.sum())
        x = x if bool(finite.all()) else x[finite]
        if len(x) == 0:
            return self
        x = x.double()
        if self.shift is None:
            self.shift = x.mean(0)
        y = x - self.shift
        squares = y.square().sum(1)
        self.count += len(y)
        self.sum += y.sum(0)
        self.scatter.addmm_(y.T, y)
        self.cubic += squares @ y
        self.quartic += float(squares.square().sum())
        return self

    def merge(self, other: "Moments") -> Self:
        """Add another's rows to these, whatever its shift. ValueError for another dimension."""
        if other.dimension != self.dimension:
            raise ValueError(f"moments: expected dimension {self.dimension}, got {other.dimension}")
        self.nonfinite += other.nonfinite
        if other.count == 0:
            return self
        assert other.shift is not None
        if self.shift is None:
            self.shift = other.shift.clone()
        n = other.count
        s = other.sum
        q = other.quartic
        self.count += n
        self.scatter += other.scatter
        delta = other.shift - self.shift
        if bool(delta.any()):
            # y' = y + delta, expanded: |y'|^2 = |y|^2 + 2 delta.y + |delta|^2.
            half = s + (n / 2) * delta
            square = float(delta @ delta)
            trace = float(other.scatter.trace())
            moved = other.scatter @ delta
            self.scatter.addr_(half, delta).addr_(delta, half)
            self.sum += s + n * delta
            self.cubic += other.cubic + trace * delta + 2 * moved + (2 * float(s @ delta) + n * square) * delta
            self.cubic += square * s
            q += 4 * float(other.cubic @ delta) + 4 * float(delta @ moved) + 2 * square * trace
            q += 4 * square * float(s @ delta) + n * square**2
        else:
            self.sum += s
            self.cubic += other.cubic
        self.quartic += q
        return self

    def without(self, other: "Moments") -> "Moments":
        """The moments of these rows without another's, which must be among them. ValueError for another dimension.

        Sums that cancel leave rounding: take away a part, not all but a few rows.
        """
        negative = Moments(other.dimension, other.shift)
        for name in ("count", "nonfinite", "sum", "scatter", "cubic", "quartic"):
            setattr(negative, name, -getattr(other, name))
        return Moments(self.dimension, self.shift).merge(self).merge(negative)

    def tensors(self, *, packed: bool = False) -> dict[str, Tensor]:
        """The whole state, float64, for safetensors: what another process merges.

        packed: the upper triangle of the symmetric `scatter`, row by row, (d (d + 1) / 2,), as `triangle` in its place.
        """
        shift = torch.zeros(self.dimension, dtype=torch.float64) if self.shift is None else self.shift
        scalars = torch.tensor([self.count, self.nonfinite, self.quartic], dtype=torch.float64)
        state = {"shift": shift, "sum": self.sum, "cubic": self.cubic, "scalars": scalars}
        if packed:
            return state | {"triangle": torch.cat([row[i:] for i, row in enumerate(self.scatter)])}
        return state | {"scatter": self.scatter}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> Self:
        """The inverse of `tensors`, packed or not. ValueError names what is missing, misshapen or not finite."""
        check_plain(tensors, "moments: tensor")
        d = tensors["sum"].numel() if "sum" in tensors else 0
        matrix: dict[str, tuple[int, ...]] = {"scatter": (d, d)}
        if "triangle" in tensors:
            matrix = {"triangle": (d * (d + 1) // 2,)}
        shapes = {"shift": (d,), "sum": (d,), **matrix, "cubic": (d,), "scalars": (3,)}
        for name, shape in shapes.items():
            # A sum is finite only if all its terms are; this is ten times as fast as asking each.
            if name not in tensors or tuple(tensors[name].shape) != shape or not tensors[name].sum().isfinite():
                raise ValueError(f"moments: tensor {name!r} is missing, not finite or not of shape {shape}")
        moments = cls(d, tensors["shift"])
        moments.count, moments.nonfinite = (int(value) for value in tensors["scalars"][:2])
        moments.quartic = float(tensors["scalars"][2])
        moments.sum, moments.cubic = (tensors[name].to("cpu", torch.float64, copy=True) for name in ("sum", "cubic"))
        if "triangle" in tensors:
            moments.scatter = _unpacked(tensors["triangle"].to("cpu", torch.float64), d)
        else:
            moments.scatter = tensors["scatter"].to("cpu", torch.float64, copy=True)
        return moments

    def mean(self) -> Tensor:
        """(d,) float64; NaN without rows."""
        if self.shift is None or self.count == 0:
            return torch.full((self.dimension,), math.nan, dtype=torch.float64)
        return self.shift + self.sum / self.count

    def covariance(self) -> Tensor:
        """(d, d) float64, divided by n - 1; NaN below two rows."""
        if self.count < 2:
            return torch.full_like(self.scatter, math.nan)
        return torch.addr(self.scatter, self.sum, self.sum, alpha=-1 / self.count).div_(self.count - 1)

    def traces(self, eigenvalues: Tensor | None = None) -> "Traces":
        """The unbiased traces of the covariance; its eigenvalues (d,), where at hand, spare a pass over it."""
        frobenius = float((self.covariance() if eigenvalues is None else eigenvalues).square().sum())
        mean = self.sum / max(1, self.count)
        along, trace = float(mean @ self.scatter @ mean), float(self.scatter.trace())
        return Traces.of(self.count, mean, trace, along, frobenius * (self.count - 1) ** 2, self.cubic, self.quartic)

    def participation_ratio(self) -> float:
        """(tr C)^2 / tr C^2 from traces each unbiased at any n and for any law, in [1, d]; 0 without variance.

        NaN below 32 rows, and where few of them carry the fourth moment (`Traces.effective_rows` below 16). Their ratio
        is not unbiased at tiny n. Rows are taken to be independent: runs of 32 alike read a few per cent low.
        """
        return self.traces().participation_ratio

    def effective_rank(self, eigenvalues: Tensor | None = None) -> float:
        """exp(entropy of the covariance's eigenvalues) with the first-order bias removed, see `entropy_correction`.

        The kurtosis it needs is read from the fourth-order sum, so that heavy tails are corrected for where they are
        elliptical. In [1, d], 0 without variance; NaN below 64 rows, where few of them carry the fourth moment, and
        where the correction exceeds 15 %: there n does not determine it. Pass `eigenvalues` (d,) of `covariance()`
        where they are at hand.
        """
        if self.count < MINIMUM_ROWS_ENTROPY:
            return math.nan
        if eigenvalues is None:
            eigenvalues = measures.spectrum(self.covariance())
        return self.traces(eigenvalues).effective_rank(eigenvalues)


class Traces:
    """Unbiased estimates of tr C, (tr C)^2 and tr C^2, and the elliptical kurtosis they imply.

    Himeno & Yamada 2014, equations 2.2 and 2.3: with S the sample covariance and Q = sum |x - mean|^4 / (n - 1),
    tr C^2 = K [(n-1)(n-2) tr S^2 + (tr S)^2 - nQ] and (tr C)^2 = K [2 tr S^2 + (n^2-3n+1)(tr S)^2 - nQ],
    K = (n-1) / (n (n-2) (n-3)). frobenius: tr S^2; fourth: Q; dimension: d.
    """

    _bias: float | None = None

    def __init__(self, count: float, dimension: int, trace: float, frobenius: float, fourth: float) -> None:
        self.count = count
        self.dimension = dimension
        self.trace = trace
        self.frobenius = frobenius
        self.fourth = fourth
        n = count
        k = (n - 1) / (n * (n - 2) * (n - 3)) if n > 3 else math.nan
        self.trace_squared = k * (2 * frobenius + (n * n - 3 * n + 1) * trace**2 - n * fourth)
        self.square_trace = k * ((n - 1) * (n - 2) * frobenius + trace**2 - n * fourth)

    @classmethod
    def of(
        cls, n: int, mean: Tensor, trace: float, along: float, frobenius: float, cubic: Tensor, quartic: float
    ) -> "Traces":
        """From sums over n rows y: mean m (d,), trace and m^T Y m of Y = sum y y^T, |Y - n m m^T|_F^2, sum |y|^2 y
        (d,) and sum |y|^4. NaN below 4 rows; a trace that is rounding and nothing else is 0."""
        if n < 4:
            return cls(n, len(mean), math.nan, math.nan, math.nan)
        square = float(mean @ mean)
        fourth = quartic - 4 * float(mean @ cubic) + 4 * along + 2 * square * trace - 3 * n * square**2
        fourth, centred, frobenius = max(0.0, fourth) / (n - 1), trace - n * square, frobenius / (n - 1) ** 2
        return cls(n, len(mean), centred / (n - 1) if centred > _ROUNDING * trace else 0.0, frobenius, fourth)

    @cached_property
    def effective_rows(self) -> float:
        """(sum |y|^2)^2 / sum |y|^4, y the centred rows: how many rows carry the variance, in [1, n].

        n where all are as long as each other, 1 where one of them is all there is. Of Gaussian rows n / (1 + 2 / PR).
        """
        return self.trace**2 * (self.count - 1) / self.fourth if self.fourth > 0 else 0.0

    def among(self, rows: float) -> "Traces":
        """The same sums per row as if they came from so many rows only, of which the others were copies."""
        n, m = self.count, min(self.count, rows)
        if not m > 3:
            return Traces(m, self.dimension, math.nan, math.nan, math.nan)
        scale = (n - 1) / n * m / (m - 1)
        return Traces(m, self.dimension, scale * self.trace, scale**2 * self.frobenius, scale * self.fourth)

    @cached_property
    def participation_ratio(self) -> float:
        """Ratio of the two, in [1, d]; 0 without variance, NaN where the rows do not determine it: `no_ratio`."""
        if self.count >= MINIMUM_ROWS_PARTICIPATION and self.trace == 0:
            return 0.0
        if self.no_ratio:
            return math.nan
        return min(max(1.0, self.trace_squared / self.square_trace), float(self.dimension))

    @property
    def no_ratio(self) -> str:
        """In words, why there is no participation ratio; empty where there is one."""
        if self.count < MINIMUM_ROWS_PARTICIPATION:
            return f"{self.count:.0f} rows; {MINIMUM_ROWS_PARTICIPATION} are needed"
        if self.trace == 0:
            return ""
        if few := self._few:
            return few
        return "" if self.square_trace > 0 and self.trace_squared > 0 else "noise hides the spectrum: more rows needed"

    @property
    def _few(self) -> str:
        carry = self.effective_rows
        if self.trace == 0 or not carry < MINIMUM_EFFECTIVE_ROWS:
            return ""
        return f"about {carry:.0f} of {self.count:.0f} rows carry the variance; {MINIMUM_EFFECTIVE_ROWS:.0f} are needed"

    @cached_property
    def kurtosis(self) -> float:
        """E|y|^4 / ((tr C)^2 + 2 tr C^2): 1 for Gaussian rows, below 1 for rows on a sphere, above with heavy tails."""
        gaussian = self.trace_squared + 2 * self.square_trace
        return self.fourth / gaussian if gaussian > 0 else 1.0

    def effective_rank(self, eigenvalues: Tensor, rows: float = math.inf) -> float:
        """See `Moments.effective_rank`; eigenvalues: those of the same rows' covariance; rows: how many of them are
        independent, where it is known."""
        if self.count >= MINIMUM_ROWS_ENTROPY and self.trace == 0:
            return 0.0
        if self.no_rank(eigenvalues, rows):
            return math.nan
        factor = math.exp(self._correction(eigenvalues) / (self.count - 1))
        return min(max(1.0, effective_rank(eigenvalues) * factor), float(self.dimension))

    def no_rank(self, eigenvalues: Tensor, rows: float = math.inf) -> str:
        """In words, why there is no effective rank; empty where there is one."""
        if self.count < MINIMUM_ROWS_ENTROPY:
            return f"{self.count:.0f} rows; {MINIMUM_ROWS_ENTROPY} are needed"
        if self.trace == 0:
            return ""
        if few := self._few:
            return few
        n = max(2.0, min(self.count, rows))
        correction = self._correction(eigenvalues)
        if correction / (n - 1) <= math.log1p(LARGEST_CORRECTION):
            return ""
        needed = 1 + math.ceil(correction / math.log1p(LARGEST_CORRECTION))
        return f"about {n:.0f} independent rows; about {needed} or more are needed for this spectrum"

    def _correction(self, eigenvalues: Tensor) -> float:
        """The entropy's bias times rows - 1. Worked out once: it is a sum over pairs of eigenvalues."""
        if self._bias is None:
            self._bias = entropy_correction(eigenvalues, 1.0, self.kurtosis)
        return self._bias


def merge(parts: Iterable[Moments]) -> Moments:
    """The moments of all parts' rows together, exact to float64 rounding. ValueError for none or unlike dimensions."""
    parts = list(parts)
    if not parts:
        raise ValueError("moments: nothing to merge")
    total = Moments(parts[0].dimension)
    for part in parts:
        total.merge(part)
    return total


def _unpacked(triangle: Tensor, d: int) -> Tensor:
    """(d (d + 1) / 2,), an upper triangle row by row -> the symmetric matrix (d, d)."""
    matrix = torch.zeros(d, d, dtype=torch.float64)
    for i, row in enumerate(torch.split(triangle, list(range(d, 0, -1)))):
        matrix[i, i:] = row
    # Mirrored in blocks: whole columns would miss the cache at each entry.
    for start in range(0, d, _PANEL):
        rows, rest = slice(start, start + _PANEL), slice(start + _PANEL, d)
        matrix[rest, rows] = matrix[rows, rest].T
        square = matrix[rows, rows]
        square += square.triu(1).T
    return matrix


class Pool(NamedTuple):
    """Rows of several parts together: mean (d,), eigenvalues (d,) of the covariance, falling; `without`: the traces of
    what remains without each part, for the jackknife; `apart` (parts, d): each part's own mean less that of all."""

    mean: Tensor
    eigenvalues: Tensor
    traces: Traces
    without: list[Traces]
    apart: Tensor


def pool(parts: Sequence[Moments]) -> Pool:
    """What a window needs of its parts, none of them empty, with two rows or more in all.

    Half of each matrix is read, once, in panels that stay in the cache, and no merged copy is made.
    """
    d = parts[0].dimension
    shift = parts[0].shift
    assert shift is not None
    parts = [
        part if part.shift is not None and torch.equal(part.shift, shift) else Moments(d, shift).merge(part)
        for part in parts
    ]
    counts = _without(torch.tensor(part.count) for part in parts).tolist()
    quartics = _without(torch.tensor(part.quartic, dtype=torch.float64) for part in parts).tolist()
    traces = _without(part.scatter.trace() for part in parts).tolist()
    sums, cubics = _without(part.sum for part in parts), _without(part.cubic for part in parts)
    means = sums / torch.tensor(counts).clamp(min=1)[:, None]
    matrix, scratch = torch.empty(d, d, dtype=torch.float64), torch.empty(_PANEL * d, dtype=torch.float64)
    along, frobenius, none = torch.empty_like(sums), [0.0] * len(counts), torch.zeros((), dtype=torch.float64)
    for start in range(0, d, _PANEL):
        rows, columns = slice(start, start + _PANEL), slice(0, start + _PANEL)
        panel = matrix[rows, columns]
        left_out = [part.scatter[rows, columns] for part in parts]
        panel.copy_(left_out[0])
        for other in left_out[1:]:
            panel += other
        flat = scratch[: panel.numel()]
        rest = flat.view_as(panel)
        # Symmetric: an entry of the panel stands for two, but in the square on the diagonal for itself alone.
        square, scaled = rest[:, start:], means[:, columns].clone()
        scaled[:, start:] *= _HALF
        views = zip([*left_out, none], sums[:, rows], scaled, along[:, rows], strict=True)
        for i, (other, total, mean, moved) in enumerate(views):
            torch.sub(panel, other, out=rest)
            square.mul_(_HALF)
            torch.mv(rest, mean, out=moved)
            rest.addr_(total, mean, alpha=-1)
            frobenius[i] += 2 * float(flat.dot(flat))
        panel.addr_(sums[-1, rows], means[-1, columns], alpha=-1)
    *without, whole = (
        Traces.of(n, mean, trace, 2 * float(mean @ moved), square, cubic, quartic)
        for n, mean, trace, moved, square, cubic, quartic in zip(
            counts, means, traces, along, frobenius, cubics, quartics, strict=True
        )
    )
    # As LAPACK stores it: spares a transposed copy, and only this triangle is filled.
    eigenvalues = measures.spectrum(matrix.mT, "U") / (counts[-1] - 1)
    own = torch.tensor([counts[-1] - count for count in counts[:-1]])
    apart = (sums[-1] - sums[:-1]) / own[:, None] - means[-1]
    return Pool(shift + means[-1], eigenvalues, whole, without, apart)


def _without(values: Iterable[Tensor]) -> Tensor:
    """(g, ...) -> (g + 1, ...): for each the sum of the others, last the sum of all."""
    each = torch.stack([*values])
    whole = each.sum(0, keepdim=True)
    return torch.cat([whole - each, whole])
